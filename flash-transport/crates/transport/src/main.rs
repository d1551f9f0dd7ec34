//! `openpi-flash-transport`: `server` is the edge of a server, `client` the sidecar of a robot.

mod logs;
mod server;
mod sidecar;
mod traces;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// QUIC transport of openpi-flash.
#[derive(Parser)]
#[command(name = "openpi-flash-transport", version)]
struct Arguments {
    #[command(flatten)]
    logs: logs::LogArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take robots' requests over QUIC and have the gateway answer them over gRPC.
    Server(Box<server::ServerArguments>),
    /// Serve PolicyService to the programs of a robot over gRPC and forward it to a server over QUIC.
    Client(Box<sidecar::SidecarArguments>),
}

/// Exit code for settings or files that cannot be used: starting again would not help.
const EXIT_CONFIG: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    arguments.logs.start();
    let done = match arguments.command {
        Command::Server(arguments) => server::run(*arguments).await,
        Command::Client(arguments) => sidecar::run(*arguments).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

/// What ends a program before it has begun, to be shown as it is.
type Fatal = Box<dyn std::error::Error + Send + Sync>;

/// Resolves at SIGTERM or SIGINT.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// The token in a file's first line.
fn read_token(path: &std::path::Path) -> Result<String, Fatal> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match text.lines().next().map(str::trim) {
        Some(token) if !token.is_empty() => Ok(token.to_owned()),
        _ => Err(format!("{}: no token in its first line", path.display()).into()),
    }
}
