//! Logs, on standard error.

use std::io::{IsTerminal, stderr};

use clap::{Args, ValueEnum};
use tracing::Level;

#[derive(Args)]
pub struct LogArguments {
    /// Least severe level that is logged.
    #[arg(long, env = "OPENPI_FLASH_LOG_LEVEL", default_value = "info", global = true)]
    log_level: Level,
    /// `text` for people, `json` for log collectors.
    #[arg(long, env = "OPENPI_FLASH_LOG_FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl LogArguments {
    /// Begins to log.
    pub fn start(&self) {
        // Of the libraries, what concerns an operator.
        let own = self.log_level;
        let filter = format!("{},openpi_flash={own}", own.min(Level::WARN));
        let filter = ["client", "edge", "transport"]
            .iter()
            .fold(filter, |filter, name| format!("{filter},openpi_flash_{name}={own}"));
        let builder =
            tracing_subscriber::fmt().with_ansi(stderr().is_terminal()).with_writer(stderr).with_env_filter(filter);
        match self.log_format {
            LogFormat::Text => builder.init(),
            LogFormat::Json => builder.json().flatten_event(true).init(),
        }
    }
}
