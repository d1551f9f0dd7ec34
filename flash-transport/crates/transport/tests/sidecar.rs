//! The sidecar: a robot's program speaks ordinary gRPC to a Unix socket and gets the server's answers over QUIC.

mod common;

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use bytes::Bytes;
use common::{HOLD, REFUSE, World, body};
use openpi_flash_grpc::{INFER_STREAM, Raw, RawCodec, path, refusal};
use openpi_flash_wire::envelope::{StreamRequest, read_stream_response, stream_request_head};
use openpi_flash_wire::{Code, Method, Refusal};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

struct Sidecar {
    child: Child,
    channel: Channel,
    socket: PathBuf,
}

impl Sidecar {
    fn new(world: &World) -> Self {
        let socket = world.folder.path().join("sidecar.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_openpi-flash-transport"))
            .args(["client", &world.address.to_string()])
            .args(["--listen", &format!("unix:{}", socket.display())])
            .arg("--ca-file")
            .arg(world.certificate())
            .spawn()
            .unwrap();
        let channel = Endpoint::try_from(format!("unix:{}", socket.display())).unwrap().connect_lazy();
        Self { child, channel, socket }
    }

    /// Resolves when its health is as expected. The program takes a moment to start.
    async fn wait_for(&self, expected: ServingStatus) {
        let mut health = HealthClient::new(self.channel.clone());
        loop {
            let request = HealthCheckRequest { service: openpi_flash_grpc::SERVICE.into() };
            match health.check(request).await {
                Ok(answer) if answer.get_ref().status() == expected => return,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn unary(&self, method: Method, body: &Bytes) -> Result<Bytes, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let request = Request::new(Raw::from(body.clone()));
        Ok(grpc.unary(request, PathAndQuery::from_static(path(method)), RawCodec).await?.into_inner())
    }

    fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    async fn exited(&mut self) -> Option<i32> {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn enveloped(request_id: u64, timeout_ms: u32, body: &Bytes) -> Raw {
    let request = StreamRequest { request_id, timeout_ms, body: body.clone(), ..StreamRequest::default() };
    Raw { head: stream_request_head(&request, ""), body: body.clone() }
}

#[tokio::test]
async fn every_method_of_the_service_is_forwarded() {
    let world = World::new().await;
    let mut sidecar = Sidecar::new(&world);
    sidecar.wait_for(ServingStatus::Serving).await;
    let sent = body(452_000);
    assert!(sidecar.unary(Method::Infer, &sent).await.unwrap().ends_with(&sent));
    assert_eq!(&sidecar.unary(Method::GetMetadata, &Bytes::new()).await.unwrap()[..], b"\x12\x01m");
    sidecar.unary(Method::Reset, &Bytes::from_static(b"\x0a\x02me")).await.unwrap();
    assert_eq!(world.gateway.bodies.lock().unwrap()[2], (Method::Reset, Bytes::from_static(b"\x0a\x02me")));

    let status = sidecar.unary(Method::Infer, &Bytes::from_static(REFUSE)).await.unwrap_err();
    let expected = Refusal { code: Code::InvalidArgument, message: "no such camera".into(), field: "images/a".into() };
    assert_eq!(refusal(&status), expected);
    sidecar.terminate();
    assert_eq!(sidecar.exited().await, Some(0));
    assert!(!sidecar.socket.exists());
}

#[tokio::test]
async fn a_stream_is_answered_in_order_and_outlives_a_refusal() {
    let world = World::new().await;
    let sidecar = Sidecar::new(&world);
    sidecar.wait_for(ServingStatus::Serving).await;
    let bodies = [body(70_000), Bytes::from_static(REFUSE), Bytes::from_static(HOLD), body(10)];
    let requests: Vec<_> = bodies
        .iter()
        .enumerate()
        .map(|(id, body)| enveloped(id as u64 + 1, if id == 2 { 50 } else { 0 }, body))
        .collect();
    let mut grpc = Grpc::new(sidecar.channel.clone());
    grpc.ready().await.unwrap();
    let outgoing = Request::new(tokio_stream::iter(requests));
    let mut answers =
        grpc.streaming(outgoing, PathAndQuery::from_static(INFER_STREAM), RawCodec).await.unwrap().into_inner();
    let mut results = Vec::new();
    while let Some(answer) = answers.next().await {
        results.push(read_stream_response(&answer.unwrap()).unwrap());
    }
    assert_eq!(results.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(results[0].1.as_ref().unwrap().ends_with(&bodies[0]));
    assert_eq!(results[1].1.as_ref().unwrap_err().field, "images/a");
    assert_eq!(results[2].1.as_ref().unwrap_err().code, Code::DeadlineExceeded);
    assert!(results[3].1.is_ok());
}

#[tokio::test]
async fn its_health_follows_the_connection() {
    let mut world = World::new().await;
    let sidecar = Sidecar::new(&world);
    sidecar.wait_for(ServingStatus::Serving).await;
    world.drain().await.unwrap();
    sidecar.wait_for(ServingStatus::NotServing).await;
    world.restart().await;
    sidecar.wait_for(ServingStatus::Serving).await;
}

#[tokio::test]
async fn a_stop_ends_open_streams_after_their_answer() {
    let world = World::new().await;
    let mut sidecar = Sidecar::new(&world);
    sidecar.wait_for(ServingStatus::Serving).await;
    let (requests, receiver) = tokio::sync::mpsc::channel(1);
    requests.send(enveloped(1, 0, &Bytes::from_static(HOLD))).await.unwrap();
    let mut grpc = Grpc::new(sidecar.channel.clone());
    grpc.ready().await.unwrap();
    let call = tokio::spawn(async move {
        let outgoing = Request::new(ReceiverStream::new(receiver));
        let path = PathAndQuery::from_static(INFER_STREAM);
        let mut answers = grpc.streaming(outgoing, path, RawCodec).await.unwrap().into_inner();
        (answers.message().await.unwrap().is_some(), answers.message().await.unwrap())
    });
    world.gateway.wait_started(1).await;
    sidecar.terminate();
    world.gateway.release.notify_waiters();
    assert_eq!(call.await.unwrap(), (true, None)); // though the robot's program would have gone on
    drop(requests);
    assert_eq!(sidecar.exited().await, Some(0));
}
