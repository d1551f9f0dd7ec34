//! What a client survives without being made anew: restarts, drains, changes of address; and that it resumes at 0-RTT.

mod common;

use std::net::UdpSocket;
use std::process::{Child, Command};
use std::time::Duration;

use bytes::Bytes;
use common::{HOLD, World, body};
use openpi_flash_client::{Call, Client, Options};

fn metric(world: &World, name: &str) -> u64 {
    let text = world.metrics.text();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.rsplit_once(' ').map_or(0, |(_, value)| value.parse().unwrap())
}

#[tokio::test]
async fn a_second_connection_resumes_at_0_rtt() {
    let world = World::new().await;
    let client = world.client().await;
    client.infer(body(10), Call::default()).await.unwrap();
    assert_eq!(metric(&world, "openpi_flash_edge_early_requests_total"), 0);
    let mut connected = client.connected();
    connected.wait_for(|connected| *connected).await.unwrap();
    client.disconnect().await;
    let sent = body(70_000);
    assert!(client.infer(sent.clone(), Call::default()).await.unwrap().body.ends_with(&sent));
    assert_eq!(metric(&world, "openpi_flash_edge_early_requests_total"), 1);
}

#[tokio::test]
async fn a_change_of_address_loses_no_request() {
    let world = World::new().await;
    let client = world.client().await;
    client.infer(body(10), Call::default()).await.unwrap();
    let held = tokio::spawn({
        let client = client.clone();
        async move { client.infer(Bytes::from_static(HOLD), Call::default()).await }
    });
    world.gateway.wait_started(2).await;
    client.rebind().await.unwrap();
    world.gateway.release.notify_waiters();
    held.await.unwrap().unwrap();
    client.infer(body(452_000), Call::default()).await.unwrap();
    assert_eq!(world.gateway.bodies.lock().unwrap().len(), 3); // none was sent twice
}

#[tokio::test]
async fn a_drain_answers_what_is_in_flight_and_sends_the_rest_elsewhere() {
    let mut world = World::new().await;
    let client = world.client().await;
    let held = tokio::spawn({
        let client = client.clone();
        async move { client.infer(Bytes::from_static(HOLD), Call::default()).await }
    });
    world.gateway.wait_started(1).await;
    let drained = world.drain();
    let late = tokio::spawn({
        let client = client.clone();
        async move { client.infer(body(10), Call::default()).await }
    });
    tokio::task::yield_now().await;
    assert!(!drained.is_finished());
    world.gateway.release.notify_waiters();
    held.await.unwrap().unwrap();
    drained.await.unwrap();
    world.restart().await;
    late.await.unwrap().unwrap();
    client.infer(body(10), Call::default()).await.unwrap();
}

/// The program itself, since only a process can be killed without a word.
struct Server {
    world: World,
    port: u16,
    child: Child,
}

impl Server {
    async fn new() -> Self {
        let world = World::new().await; // for its gateway and files
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Self::start(&world, port);
        Self { world, port, child }
    }

    fn start(world: &World, port: u16) -> Child {
        let folder = world.folder.path();
        Command::new(env!("CARGO_BIN_EXE_openpi-flash-transport"))
            .args(["server", "--action-listen", &format!("127.0.0.1:{port}")])
            .args(["--action-upstream", &folder.join("gateway.sock").display().to_string()])
            .arg("--state-dir")
            .arg(folder)
            .spawn()
            .unwrap()
    }

    fn options(&self) -> Options {
        Options { port: self.port, ..self.world.options() }
    }

    fn restart(&mut self) {
        self.child = Self::start(&self.world, self.port);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_killed_server_is_found_again_by_the_same_client() {
    let mut server = Server::new().await;
    let client = Client::connect(server.options()).await.unwrap();
    client.infer(body(10), Call::default()).await.unwrap();
    for _ in 0..2 {
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        server.restart();
        client.infer(body(70_000), Call::default()).await.unwrap();
    }
}

#[tokio::test]
async fn a_stopped_server_answers_what_is_in_flight_and_exits_with_0() {
    let mut server = Server::new().await;
    let client = Client::connect(server.options()).await.unwrap();
    let held = tokio::spawn({
        let client = client.clone();
        async move { client.infer(Bytes::from_static(HOLD), Call::default()).await }
    });
    server.world.gateway.wait_started(1).await;
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    server.world.gateway.release.notify_waiters();
    held.await.unwrap().unwrap();
    let exited = tokio::task::spawn_blocking(move || {
        let status = server.child.wait().unwrap();
        (server, status)
    });
    let (mut server, status) = exited.await.unwrap();
    assert_eq!(status.code(), Some(0));
    server.restart();
    client.infer(body(10), Call { timeout: Some(Duration::from_secs(10)), ..Call::default() }).await.unwrap();
}

#[tokio::test]
async fn without_a_server_a_call_fails_in_the_time_for_it() {
    let mut server = Server::new().await;
    let client = Client::connect(server.options()).await.unwrap();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let call = Call { timeout: Some(Duration::from_millis(50)), ..Call::default() };
    let error = client.infer(body(10), call).await.unwrap_err();
    assert_eq!(error.code(), openpi_flash_client::Code::DeadlineExceeded);
}
