//! Traces, to an OTLP collector.

use clap::Args;
use openpi_flash_traces::Traces;

use crate::Fatal;

/// What names a collector for every OpenTelemetry program; it counts where nothing of our own does.
const STANDARD_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

#[derive(Args)]
pub struct TraceArguments {
    /// OTLP gRPC endpoint for traces, e.g. http://localhost:4317 [default: OTEL_EXPORTER_OTLP_ENDPOINT, or no traces].
    #[arg(long, env = "OPENPI_FLASH_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Share of traces kept among those that no caller has decided about.
    #[arg(long, env = "OPENPI_FLASH_TRACE_SAMPLE_RATIO", default_value_t = 1.0)]
    trace_sample_ratio: f64,
}

impl TraceArguments {
    /// Begins to trace, as `service`, if there is a collector.
    pub fn start(&self, service: &'static str) -> Result<Traces, Fatal> {
        if !(0.0..=1.0).contains(&self.trace_sample_ratio) {
            return Err(format!("--trace-sample-ratio {}: 0 to 1 is expected", self.trace_sample_ratio).into());
        }
        let endpoint = self.otlp_endpoint.clone().or_else(|| std::env::var(STANDARD_VARIABLE).ok());
        match endpoint.as_deref().map(str::trim).filter(|endpoint| !endpoint.is_empty()) {
            None => Ok(Traces::default()),
            Some(endpoint) => Ok(Traces::to(endpoint, service, self.trace_sample_ratio)?),
        }
    }
}
