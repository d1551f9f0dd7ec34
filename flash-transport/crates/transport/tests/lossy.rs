//! A link that delays and loses: requests and answers arrive, whole and right, by datagrams or by their streams.

mod common;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{HOLD, World, body};
use openpi_flash_client::{Answer, Call, Client, Error};
use tokio::net::UdpSocket;
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

/// One way; error correction is used where a round trip takes a millisecond or more.
const DELAY: Duration = Duration::from_millis(4);
const MAX_PACKET: usize = 2048;
const CALLS: u64 = 12;

/// What happens to packets on their way, in both directions.
#[derive(Default)]
struct Weather {
    /// Of a thousand packets, how many get lost.
    loss: AtomicUsize,
    /// Whether packets too large for a header or a word of feedback get lost, all of them.
    only_small: AtomicBool,
    /// How many were lost for that.
    num_large_lost: AtomicUsize,
    /// Whether the next packet makes the client appear at another port.
    move_client: AtomicBool,
}

/// A relay between clients and a server.
struct Link {
    port: u16,
    weather: Arc<Weather>,
    _task: JoinSet<()>,
}

impl Link {
    async fn to(server: SocketAddr) -> Self {
        let near = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let port = near.local_addr().unwrap().port();
        let weather = Arc::new(Weather::default());
        let mut task = JoinSet::new();
        task.spawn(relay(near, server, Arc::clone(&weather)));
        Self { port, weather, _task: task }
    }

    async fn client(&self, world: &World) -> Client {
        let mut options = world.options();
        options.port = self.port;
        options.tuning.idle_timeout = Duration::from_secs(30);
        Client::connect(options).await.unwrap()
    }
}

async fn relay(near: Arc<UdpSocket>, server: SocketAddr, weather: Arc<Weather>) {
    let random = Arc::new(Mutex::new(fastrand::Rng::with_seed(1)));
    let mut ways: HashMap<SocketAddr, (Arc<UdpSocket>, JoinSet<()>)> = HashMap::new();
    let mut packet = [0; MAX_PACKET];
    loop {
        let (length, client) = near.recv_from(&mut packet).await.unwrap();
        if weather.move_client.swap(false, Ordering::SeqCst) {
            ways.clear();
        }
        let far = match ways.get(&client) {
            Some((far, _)) => Arc::clone(far),
            None => {
                let far = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                far.connect(server).await.unwrap();
                let mut back = JoinSet::new();
                let (near, random, weather) = (Arc::clone(&near), Arc::clone(&random), Arc::clone(&weather));
                back.spawn(relay_back(Arc::clone(&far), near, client, weather, random));
                ways.insert(client, (Arc::clone(&far), back));
                far
            }
        };
        if survives(&weather, &random, length).await {
            let packet = packet[..length].to_vec();
            tokio::spawn(async move {
                sleep(DELAY).await;
                let _ = far.send(&packet).await;
            });
        }
    }
}

async fn relay_back(
    far: Arc<UdpSocket>,
    near: Arc<UdpSocket>,
    client: SocketAddr,
    weather: Arc<Weather>,
    random: Arc<Mutex<fastrand::Rng>>,
) {
    let mut packet = [0; MAX_PACKET];
    while let Ok(length) = far.recv(&mut packet).await {
        if survives(&weather, &random, length).await {
            let (near, packet) = (Arc::clone(&near), packet[..length].to_vec());
            tokio::spawn(async move {
                sleep(DELAY).await;
                let _ = near.send_to(&packet, client).await;
            });
        }
    }
}

async fn survives(weather: &Weather, random: &Mutex<fastrand::Rng>, length: usize) -> bool {
    let lost = random.lock().await.usize(..1000) < weather.loss.load(Ordering::SeqCst);
    let too_large = weather.only_small.load(Ordering::SeqCst) && length > 600;
    weather.num_large_lost.fetch_add(usize::from(too_large), Ordering::SeqCst);
    !lost && !too_large
}

fn transfers(world: &World, direction: &str, path: &str) -> u64 {
    let labels =
        format!("openpi_flash_edge_transfers_total{{slot=\"action\",direction=\"{direction}\",path=\"{path}\"}}");
    let text = world.metrics.text();
    let value = text.lines().find_map(|line| line.strip_prefix(&labels)).map(str::trim);
    value.map_or(0, |value| value.parse().unwrap())
}

/// A call that the gateway has and does not answer yet.
async fn hold(world: &World, client: &Client) -> JoinHandle<Result<Answer, Error>> {
    let client = client.clone();
    let held = tokio::spawn(async move { client.infer(HOLD.into(), Call::default()).await });
    world.gateway.wait_started(1).await;
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lossy_link_is_crossed_by_datagrams() {
    let world = World::new().await;
    let link = Link::to(world.address).await;
    link.weather.loss.store(50, Ordering::SeqCst);
    let client = link.client(&world).await;

    for call in 0..CALLS {
        let sent = body(40_000 + 17 * call as usize);
        let answer = client.infer(sent.clone(), Call::default()).await.unwrap();
        assert!(answer.body.ends_with(&sent));
    }
    let by_datagrams = transfers(&world, "in", "datagrams");
    assert_eq!(by_datagrams + transfers(&world, "in", "stream"), CALLS);
    assert!(by_datagrams > CALLS / 2, "{by_datagrams} of {CALLS}");
    assert!(transfers(&world, "out", "datagrams") > CALLS / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_at_once_get_each_its_own_answer() {
    let world = World::new().await;
    let link = Link::to(world.address).await;
    link.weather.loss.store(30, Ordering::SeqCst);
    let client = link.client(&world).await;
    let mut calls = JoinSet::new();
    for length in (0..24).map(|call| 9_000 + 1_111 * call) {
        let client = client.clone();
        calls.spawn(async move {
            let sent = body(length);
            let answer = client.infer(sent.clone(), Call::default()).await.unwrap();
            assert!(answer.body.ends_with(&sent));
        });
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap();
    }
    assert_eq!(world.gateway.started.load(Ordering::SeqCst), 24); // none was asked twice
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_datagrams_do_not_carry_goes_over_the_stream() {
    let world = World::new().await;
    let link = Link::to(world.address).await;
    let client = link.client(&world).await;
    link.weather.only_small.store(true, Ordering::SeqCst);
    let sent = body(5_000);
    let call = tokio::spawn({
        let (client, sent) = (client.clone(), sent.clone());
        async move { client.infer(sent, Call::default()).await }
    });
    // Five datagrams and their repairs, three questions, and then the stream's packets, again and again.
    while link.weather.num_large_lost.load(Ordering::SeqCst) < 40 {
        sleep(Duration::from_millis(10)).await;
    }
    link.weather.only_small.store(false, Ordering::SeqCst);
    assert!(call.await.unwrap().unwrap().body.ends_with(&sent));
    assert_eq!(transfers(&world, "in", "stream"), 1);
    let answer = client.infer(sent.clone(), Call::default()).await.unwrap(); // and the connection is as it was
    assert!(answer.body.ends_with(&sent));
    assert_eq!(world.gateway.started.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_given_up_ends_the_work() {
    let world = World::new().await;
    let link = Link::to(world.address).await;
    let client = link.client(&world).await;
    let held = hold(&world, &client).await;
    held.abort();
    world.gateway.wait(|gateway| gateway.dropped.load(Ordering::SeqCst) == 1).await;
    let sent = body(20_000);
    assert!(client.infer(sent.clone(), Call::default()).await.unwrap().body.ends_with(&sent));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_address_changes_in_mid_call_loses_nothing() {
    let world = World::new().await;
    let link = Link::to(world.address).await;
    let client = link.client(&world).await;
    let held = hold(&world, &client).await;
    link.weather.move_client.store(true, Ordering::SeqCst); // as a NAT does that has forgotten it
    let sent = body(60_000);
    assert!(client.infer(sent.clone(), Call::default()).await.unwrap().body.ends_with(&sent));
    world.gateway.release.notify_waiters();
    held.await.unwrap().unwrap();
    assert_eq!(world.gateway.started.load(Ordering::SeqCst), 2); // none was sent twice
}
