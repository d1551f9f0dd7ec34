//! Measures `infer` over loopback, through the edge and the gRPC stream behind it to a service that answers at once
//! with 3 KB: p50 and p99 in milliseconds, beside the same service asked directly over gRPC.
//!
//! `cargo run --release --example loopback [CALLS]`

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openpi_flash_client::{Call, Client, Fingerprint, Options, Trust};
use openpi_flash_edge::{Edge, EndpointSettings, Identity, Limits, Settings, Timeouts, UpstreamSettings};
use openpi_flash_grpc::{CallContext, Handler, INFER_STREAM, PolicyServer, Raw, RawCodec};
use openpi_flash_quic::Tuning;
use openpi_flash_traces::Traces;
use openpi_flash_wire::envelope::{StreamRequest, stream_request_head};
use openpi_flash_wire::{Method, Refusal};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Server};

struct AtOnce;

impl Handler for AtOnce {
    async fn call(&self, _: Method, _: Bytes, _: CallContext) -> Result<Bytes, Refusal> {
        Ok(Bytes::from_static(&[0; 3000]))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let calls = std::env::args().nth(1).map_or(Ok(2000), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("gateway.sock");
    let server = Runtime::new()?;
    let identity = Identity::load_or_create(folder.path(), None, &["localhost".into()])?;
    let fingerprint = identity.certified.fingerprint();
    let address = format!("unix:{}", socket.display());
    let port = server.block_on(serve(identity, address.clone(), &socket))?;
    println!("{:<12}{:>12}{:>12}{:>12}{:>12}", "bytes", "QUIC p50", "p99", "gRPC p50", "p99");
    for length in [452_000, 70_000] {
        let body = Bytes::from(vec![7; length]);
        let quic = quic(port, fingerprint, &body, calls)?;
        let grpc = grpc(&address, &body, calls)?;
        println!("{length:<12}{:>12.3}{:>12.3}{:>12.3}{:>12.3}", quic.0, quic.1, grpc.0, grpc.1);
    }
    server.shutdown_background();
    Ok(())
}

async fn serve(identity: Identity, upstream: String, socket: &Path) -> Result<u16, Box<dyn std::error::Error>> {
    let service = Server::builder().initial_stream_window_size(4 << 20).add_service(PolicyServer::new(
        AtOnce,
        64 << 20,
        std::future::pending(),
    ));
    tokio::spawn(service.serve_with_incoming(UnixListenerStream::new(UnixListener::bind(socket)?)));
    let edge = Edge::bind(Settings {
        endpoints: vec![EndpointSettings {
            slot: "action",
            listen: ([127, 0, 0, 1], 0).into(),
            upstream: UpstreamSettings { address: upstream, ca_file: None, token: None },
        }],
        identity,
        client_ca: None,
        tokens: None,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
        tuning: Tuning { keep_alive: None, idle_timeout: Duration::from_secs(10), ..Tuning::default() },
        metrics: None,
        traces: Traces::default(),
    })
    .await?;
    let port = edge.addresses()?[0].1.port();
    tokio::spawn(edge.serve(std::future::pending()));
    Ok(port)
}

fn quic(port: u16, pin: Fingerprint, body: &Bytes, calls: usize) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let mut options = Options::new("127.0.0.1", port);
    options.trust = Trust::Fingerprint(pin);
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let client = runtime.block_on(Client::connect(options))?;
    let mut times = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        runtime.block_on(client.infer(body.clone(), Call::default()))?;
        times.push(start.elapsed());
    }
    Ok(percentiles(times))
}

fn grpc(address: &str, body: &Bytes, calls: usize) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let runtime = Runtime::new()?;
    runtime.block_on(async {
        let mut grpc = Grpc::new(Endpoint::try_from(address.to_owned())?.connect().await?);
        grpc.ready().await?;
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        let request = StreamRequest { request_id: 1, body: body.clone(), ..StreamRequest::default() };
        let raw = Arc::new(Raw { head: stream_request_head(&request, ""), body: body.clone() });
        requests.send(Raw::clone(&raw)).await?;
        let path = PathAndQuery::from_static(INFER_STREAM);
        let outgoing = tonic::Request::new(ReceiverStream::new(receiver));
        let mut answers = grpc.streaming(outgoing, path, RawCodec).await?.into_inner();
        answers.message().await?;
        let mut times = Vec::new();
        for _ in 0..calls {
            let start = Instant::now();
            requests.send(Raw::clone(&raw)).await?;
            answers.message().await?;
            times.push(start.elapsed());
        }
        Ok(percentiles(times))
    })
}

fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    (at(0.5), at(0.99))
}
