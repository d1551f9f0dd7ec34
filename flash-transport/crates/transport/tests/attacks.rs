//! Attacks on the program of the server, in a process of its own whose memory is watched: each peer is refused or closed
//! within its time, what it makes the server hold stays within the limits, and a robot beside it gets every answer.

mod common;

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use common::{authority, body, serve_gateway};
use openpi_flash_client::{Call, Certified, Client, Code, Fingerprint, Options, Refusal, Trust};
use openpi_flash_grpc::{CallContext, Handler};
use openpi_flash_quic::stream::{read_frame, write_frame};
use openpi_flash_quic::{Tuning, tls};
use openpi_flash_wire::{CloseCode, Hello, Method, Request, Response, encode};
use quinn::{Connection, ConnectionError, Endpoint, SendStream, TransportErrorCode};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

const MIB: usize = 1 << 20;

/// What a server without load may grow by: threads' heaps, buffers of sockets and of the robot's own requests.
const SLACK: usize = 16 * MIB;

/// What a connection takes besides what it has sent.
const CONNECTION: usize = 256 << 10;

/// What a client's streams and its datagrams may take before its hello is accepted: what has arrived on streams, twice,
/// since it holds packets that came together with others; datagrams that wait to be taken in, and those that were.
const BEFORE_HELLO: usize = 2 * ((1 << 20) + (64 << 10)) + (2 << 20) + (5 << 18);

/// Longest that anything is waited for; nothing depends on it unless the test fails.
const AT_MOST: Duration = Duration::from_secs(150);

/// After which a peer gives up by itself, and says so, before the whole attack is taken for one that hangs.
const PATIENCE: Duration = Duration::from_secs(50);

const TOKEN: &str = "the robot's";

/// Answers with what was asked, and keeps nothing.
struct Mirror;

impl Handler for Mirror {
    async fn call(&self, _: Method, body: Bytes, _: CallContext) -> Result<Bytes, Refusal> {
        Ok(body)
    }
}

/// The program, before a gateway that mirrors.
struct Server {
    child: Child,
    /// Whether its log has said so.
    panicked: Arc<AtomicBool>,
    address: SocketAddr,
    metrics: SocketAddr,
    folder: TempDir,
    gateway: JoinHandle<()>,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments)
    }

    fn start_in(folder: TempDir, arguments: &[&str]) -> Self {
        let gateway = serve_gateway(folder.path(), Mirror);
        std::fs::write(folder.path().join("tokens"), TOKEN).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_openpi-flash-transport"))
            .args(["--log-format", "json", "server", "--action-listen", "127.0.0.1:0"])
            .args(["--action-upstream", &format!("unix:{}", folder.path().join("gateway.sock").display())])
            .args(["--metrics-listen", "127.0.0.1:0", "--state-dir"])
            .arg(folder.path())
            .arg("--tokens-file")
            .arg(folder.path().join("tokens"))
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (found, addresses) = mpsc::channel();
        let log = BufReader::new(child.stderr.take().unwrap());
        let panicked = Arc::new(AtomicBool::new(false));
        let said = Arc::clone(&panicked);
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once(r#""address":""#) {
                    let _ = found.send(rest.split('"').next().unwrap().parse().unwrap());
                }
                if line.contains("panicked") {
                    eprintln!("{line}");
                    said.store(true, Ordering::SeqCst);
                }
            }
        });
        let next = || addresses.recv_timeout(AT_MOST).expect("the server starts");
        Self { address: next(), metrics: next(), child, panicked, folder, gateway }
    }

    fn certificate(&self) -> PathBuf {
        self.folder.path().join("edge-cert.pem")
    }

    fn options(&self) -> Options {
        let mut options = Options::new("127.0.0.1", self.address.port());
        options.trust = Trust::CaFile(self.certificate());
        options.token = TOKEN.into();
        // The machine may be slow, and a time-out is no attack.
        options.tuning.idle_timeout = PATIENCE;
        (options.connect_timeout, options.call_timeout) = (PATIENCE, PATIENCE);
        options
    }

    /// A value of the process's memory, in bytes.
    fn memory(&self, name: &str) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_matches([':', '\t', ' ']).trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// Resolves when no more than so many clients that have said hello are connected.
    async fn at_most_connected(&self, count: u64) {
        loop {
            let mut stream = TcpStream::connect(self.metrics).await.unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
            let mut page = String::new();
            stream.read_to_string(&mut page).await.unwrap();
            let sample = r#"openpi_flash_edge_connections{slot="action"} "#;
            let connected = page.lines().find_map(|line| line.strip_prefix(sample)).unwrap();
            if connected.parse::<u64>().unwrap() <= count {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs an attack while a robot is served, which gets every answer; the server grows by `growth` bytes at most.
    async fn endures(&self, options: Options, attack: impl Future<Output = ()>, growth: usize) {
        let robot = Robot::start(options).await;
        let before = self.memory("VmRSS");
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap(); // the peak begins anew
        timeout(AT_MOST, attack).await.expect("every peer is refused or closed in time");
        let answered = robot.finish().await;
        let peak = self.memory("VmHWM");
        let figures = format!(
            "{:.1} MiB before, {:.1} at most during, {:.1} allowed, {answered} answers beside it",
            before as f64 / MIB as f64,
            peak as f64 / MIB as f64,
            (before + growth) as f64 / MIB as f64,
        );
        println!("{figures}");
        assert!(!self.panicked.load(Ordering::SeqCst), "the server has panicked, see above");
        assert!(peak <= before + growth, "{figures}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.gateway.abort();
    }
}

/// A robot that asks without a pause and looks at every answer.
struct Robot {
    answered: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Robot {
    async fn start(options: Options) -> Self {
        let client = Client::connect(options).await.unwrap();
        let (answered, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (Arc::clone(&answered), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::SeqCst) {
                let sent = body(70_000 + count.load(Ordering::SeqCst) % 1000);
                let answer = client.infer(sent.clone(), Call::default()).await.unwrap();
                assert!(answer.body.ends_with(&sent));
                count.fetch_add(1, Ordering::SeqCst);
                sleep(Duration::from_millis(1)).await;
            }
        });
        let robot = Self { answered, stop, task };
        robot.answers(20).await;
        robot
    }

    /// Resolves after so many more answers.
    async fn answers(&self, count: usize) {
        let wanted = self.answered.load(Ordering::SeqCst) + count;
        while self.answered.load(Ordering::SeqCst) < wanted && !self.task.is_finished() {
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Goes on for a few more answers; how many there were.
    async fn finish(self) -> usize {
        self.answers(20).await;
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap();
        self.answered.load(Ordering::SeqCst)
    }
}

/// Peers that write what they like, all from one socket at `source`.
struct Peers {
    endpoint: Endpoint,
    server: SocketAddr,
}

impl Peers {
    fn new(server: &Server) -> Self {
        Self::from(Ipv4Addr::LOCALHOST, server, &Trust::CaFile(server.certificate()), None)
    }

    fn from(source: Ipv4Addr, server: &Server, trust: &Trust, certificate: Option<&Certified>) -> Self {
        let tuning = Tuning { idle_timeout: PATIENCE, ..Tuning::default() };
        let mut config = quinn::ClientConfig::new(Arc::new(tls::client(trust, certificate).unwrap()));
        config.transport_config(Arc::new(tuning.transport()));
        let mut endpoint = Endpoint::client((source, 0).into()).unwrap();
        endpoint.set_default_client_config(config);
        Self { endpoint, server: server.address }
    }

    async fn connect(&self) -> Result<Connection, ConnectionError> {
        self.endpoint.connect(self.server, "127.0.0.1").unwrap().await
    }

    /// Says hello with a token.
    async fn greet(&self, token: &str) -> Result<Connection, ConnectionError> {
        let connection = self.connect().await?;
        let mut stream = connection.open_uni().await?;
        let _ = write_frame(&mut stream, &Hello { token: token.into() }, Bytes::new()).await;
        Ok(connection)
    }
}

fn request(body_length: usize) -> Bytes {
    encode(&Request::new(Method::Infer, body_length as u32)).unwrap()
}

/// Why the server ended a connection.
async fn closed(connection: Connection) -> CloseCode {
    reason(&connection.closed().await)
}

fn reason(error: &ConnectionError) -> CloseCode {
    match error {
        ConnectionError::ApplicationClosed(close) => CloseCode::from_code(close.error_code.into_inner()).unwrap(),
        other => panic!("{other}"),
    }
}

/// Writes to a new stream and says how the server refused it.
async fn refused(connection: Connection, write: impl AsyncFnOnce(&mut SendStream)) -> Code {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    write(&mut send).await;
    read_frame::<Response>(&mut receive, 0).await.unwrap().header.refusal.unwrap().code
}

/// Writes as much as the server takes.
async fn fill(stream: &mut SendStream, bytes: usize) {
    let block = Bytes::from(vec![7; bytes.min(64 << 10)]);
    let stopped = stream.stopped(); // which a write that waits for the window does not always notice
    let write = async {
        for _ in 0..bytes.div_ceil(block.len()) {
            if stream.write_chunk(block.clone()).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = write => {}
        _ = stopped => {}
    }
}

/// Writes a byte at a time, slowly enough for no header to be whole in time, until the server has enough of it.
async fn drip(stream: &mut SendStream) {
    while stream.write_all(&[1]).await.is_ok() {
        sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ((ca, robot), (_, stranger)) = (authority(folder.path()), authority(elsewhere.path()));
    let server = Server::start_in(folder, &["--client-ca-file", ca.to_str().unwrap()]);
    let mut options = server.options();
    options.certificate = Some(robot.clone());
    let trust = Trust::CaFile(server.certificate());
    let attack = async {
        for _ in 0..10 {
            for certificate in [None, Some(&stranger)] {
                let peers = Peers::from(Ipv4Addr::LOCALHOST, &server, &trust, certificate);
                // The client's handshake is over before the server has seen its certificate.
                let error = match peers.connect().await {
                    Ok(connection) => connection.closed().await,
                    Err(error) => error,
                };
                let ConnectionError::ConnectionClosed(close) = &error else { panic!("{error}") };
                assert!((0x100..0x200).contains(&u64::from(close.error_code)), "a TLS alert, {error}");
            }
            let peers = Peers::from(Ipv4Addr::LOCALHOST, &server, &trust, Some(&robot));
            for token in ["", "wrong", &"x".repeat(4096)] {
                let connection = peers.greet(token).await.unwrap();
                assert_eq!(closed(connection).await, CloseCode::Unauthenticated);
            }
            let pin = "00".repeat(32).parse::<Fingerprint>().unwrap();
            let peers = Peers::from(Ipv4Addr::LOCALHOST, &server, &Trust::Fingerprint(pin), Some(&robot));
            let error = peers.connect().await.unwrap_err();
            assert!(matches!(error, ConnectionError::TransportError(_)), "{error}");
        }
    };
    server.endures(options, attack, SLACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn little_is_held_for_a_client_without_a_hello() {
    const CLIENTS: usize = 4;
    let server = Server::start(&["--handshake-timeout-ms", "4000"]);
    let peers = Peers::new(&server);
    let attack = async {
        let mut clients = JoinSet::new();
        for index in 0..CLIENTS {
            let connection = peers.connect().await.unwrap();
            let mut hello = connection.open_uni().await.unwrap();
            hello.write_all(&[1, 0, 16, 0]).await.unwrap(); // a token of 4096 bytes, of which none comes
            let mut writers = JoinSet::new();
            for _ in 0..64 {
                let connection = connection.clone();
                writers.spawn(async move {
                    if let Ok((mut send, _receive)) = connection.open_bi().await {
                        let _ = send.write_chunk(request(32 * MIB)).await;
                        fill(&mut send, 16 * MIB).await;
                    }
                });
            }
            let datagrams = connection.clone();
            writers.spawn(async move {
                let mut random = fastrand::Rng::with_seed(index as u64);
                for _ in 0..16 * MIB / 1000 {
                    let datagram = (0..random.usize(0..1000)).map(|_| random.u8(..)).collect();
                    if datagrams.send_datagram_wait(datagram).await.is_err() {
                        return;
                    }
                }
            });
            clients.spawn(async move {
                let reason = closed(connection).await;
                drop((hello, writers));
                reason
            });
        }
        while let Some(reason) = clients.join_next().await {
            assert_eq!(reason.unwrap(), CloseCode::Limit);
        }
    };
    server.endures(server.options(), attack, CLIENTS * (BEFORE_HELLO + CONNECTION) + SLACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_frame_is_refused() {
    let server = Server::start(&[]);
    let peers = Peers::new(&server);
    let attack = async {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..50 {
            let connection = peers.connect().await.unwrap();
            let mut stream = connection.open_uni().await.unwrap();
            let hello = match random.u8(..3) {
                0 => (0..random.usize(1..2000)).map(|_| random.u8(..)).collect(),
                1 => vec![1, 0, 0xff, 0xff], // a token of 65535 bytes
                _ => vec![1, 0, 0, 9, b'x'], // cut off
            };
            let _ = stream.write_all(&hello).await;
            let _ = stream.finish();
            assert_eq!(closed(connection).await, CloseCode::Protocol, "{hello:?}");
        }
        let connection = peers.greet(TOKEN).await.unwrap();
        for _ in 0..300 {
            let mut bytes: Vec<u8> = (0..random.usize(1..2000)).map(|_| random.u8(..)).collect();
            match random.u8(..4) {
                0 => {}
                1 => bytes[0] = 1,
                2 => bytes = request(usize::MAX).to_vec(),
                _ => {
                    bytes = [&request(bytes.len())[..], &bytes].concat();
                    let at = random.usize(..4);
                    bytes[at] ^= 1 << random.u8(..8);
                    bytes.truncate(bytes.len() - 1);
                }
            }
            let write = async |stream: &mut SendStream| {
                let _ = stream.write_all(&bytes).await;
                let _ = stream.finish();
            };
            assert_eq!(refused(connection.clone(), write).await, Code::InvalidArgument);
        }
        connection.close(0u32.into(), b"");
        for _ in 0..50 {
            let connection = peers.greet(TOKEN).await.unwrap();
            let datagram: Vec<u8> = (0..random.usize(1..1000)).map(|_| random.u8(..0x10)).collect();
            connection.send_datagram_wait(datagram.into()).await.unwrap();
            assert_eq!(closed(connection).await, CloseCode::Protocol);
        }
        server.at_most_connected(1).await;
    };
    server.endures(server.options(), attack, SLACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_silent_peers_are_ended_in_time() {
    const PEERS: usize = 10;
    let timeouts = ["--handshake-timeout-ms", "2000", "--transfer-timeout-ms", "2000", "--idle-timeout-ms", "6000"];
    let server = Server::start(&timeouts);
    let peers = Peers::new(&server);
    let attack = async {
        let mut endings = JoinSet::new();
        for _ in 0..PEERS {
            let connection = peers.connect().await.unwrap();
            let mut hello = connection.open_uni().await.unwrap();
            hello.write_all(&[1, 0, 16, 0]).await.unwrap();
            endings.spawn(async move {
                drip(&mut hello).await;
                assert_eq!(closed(connection).await, CloseCode::Limit);
            });
            let connection = peers.connect().await.unwrap();
            endings.spawn(async move { assert_eq!(closed(connection).await, CloseCode::Limit) }); // says nothing
            let connection = peers.greet(TOKEN).await.unwrap();
            endings.spawn(async move {
                let body = refused(connection.clone(), async |stream| {
                    stream.write_all(&request(MIB)).await.unwrap();
                    drip(stream).await;
                });
                let header = refused(connection.clone(), async |stream| drip(stream).await);
                let half_open = refused(connection.clone(), async |stream| stream.write_all(&[1]).await.unwrap());
                let ended = (Code::DeadlineExceeded, Code::DeadlineExceeded, Code::DeadlineExceeded);
                assert_eq!(tokio::join!(body, header, half_open), ended);
            });
        }
        // Robots that are gone without a word: their endpoint dies with its runtime.
        let (trust, address) = (Trust::CaFile(server.certificate()), server.address);
        let gone = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let config = quinn::ClientConfig::new(Arc::new(tls::client(&trust, None).unwrap()));
                let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
                endpoint.set_default_client_config(config);
                let peers = Peers { endpoint, server: address };
                for _ in 0..PEERS {
                    let connection = peers.greet(TOKEN).await.unwrap();
                    let (mut send, _receive) = connection.open_bi().await.unwrap();
                    send.write_all(&request(MIB)).await.unwrap();
                    std::mem::forget((connection, send)); // nothing is said when they are dropped
                }
                std::mem::forget(peers);
            });
            std::mem::forget(runtime);
        });
        gone.join().unwrap();
        while let Some(ending) = endings.join_next().await {
            ending.unwrap();
        }
        drop(peers);
        server.at_most_connected(1).await;
    };
    server.endures(server.options(), attack, 4 * PEERS * CONNECTION + SLACK).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_handshakes_is_cut_off() {
    const PER_ADDRESS: usize = 16;
    const CONNECTIONS: usize = 64;
    let limits = ["--max-handshakes-per-address", "8", "--handshakes-before-retry", "4", "--max-connections", "64"];
    // Shorter than a robot's patience: a flood may drown a silent peer's farewell, and its place is free only then.
    let times = ["--handshake-timeout-ms", "30000", "--idle-timeout-ms", "60000"];
    let server = Server::start(&[&limits[..], &times[..]].concat());
    let attack = async {
        let mut attempts = JoinSet::new();
        for host in 2..22 {
            let trust = Trust::CaFile(server.certificate());
            let peers = Arc::new(Peers::from(Ipv4Addr::new(127, 0, 0, host), &server, &trust, None));
            for _ in 0..PER_ADDRESS {
                let peers = Arc::clone(&peers);
                attempts.spawn(async move { (host, peers.connect().await) });
            }
        }
        let noise = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..20_000 {
            let mut packet: Vec<u8> = (0..random.usize(1..1472)).map(|_| random.u8(..)).collect();
            if packet.len() > 20 && random.bool() {
                packet[..6].copy_from_slice(&[0xc0, 0, 0, 0, 1, 8]); // the first packet of a connection, as it seems
                packet[14] = 0;
            }
            let _ = noise.send_to(&packet, server.address).await;
        }
        let mut silent = Vec::new(); // they keep their places and say nothing
        while let Some(attempt) = attempts.join_next().await {
            match attempt.unwrap() {
                (host, Ok(connection)) => silent.push((host, connection)),
                (_, Err(ConnectionError::ConnectionClosed(close))) => {
                    // The latter where the Retry lay about for longer than it is good for.
                    let refusals = [TransportErrorCode::CONNECTION_REFUSED, TransportErrorCode::INVALID_TOKEN];
                    assert!(refusals.contains(&close.error_code), "{close}");
                }
                // Too much of what it sent was drowned.
                (_, Err(ConnectionError::TimedOut)) => {}
                (_, Err(error)) => panic!("{error}"),
            }
        }
        assert!(
            (1..CONNECTIONS).contains(&silent.len()),
            "some are let in, and the robot has a place, too; {}",
            silent.len()
        );
        for host in 2..22 {
            assert!(silent.iter().filter(|(of, _)| *of == host).count() <= 8);
        }
        drop(silent);
        Client::connect(server.options()).await.unwrap().infer(body(10), Call::default()).await.unwrap();
    };
    server.endures(server.options(), attack, CONNECTIONS * CONNECTION + SLACK).await;
}

/// Leaves a body unfinished, as large a one as the server has room for.
async fn squeeze(connection: Connection) -> Code {
    let mut bytes = MIB;
    loop {
        let write = async |stream: &mut SendStream| {
            let _ = stream.write_chunk(request(8 * MIB)).await;
            fill(stream, bytes).await;
        };
        let code = refused(connection.clone(), write).await;
        if code != Code::ResourceExhausted || bytes < 16 << 10 {
            return code;
        }
        bytes /= 2;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_bodies_leave_room_for_others() {
    const CLIENTS: usize = 8;
    const STREAMS: usize = 16;
    const CONNECTION_BYTES: usize = 4 * MIB;
    const TOTAL_BYTES: usize = 8 * MIB;
    let (own, total) = (CONNECTION_BYTES.to_string(), TOTAL_BYTES.to_string());
    let limits = ["--max-connection-bytes", &own, "--max-total-bytes", &total, "--transfer-timeout-ms", "3000"];
    let server = Server::start(&limits);
    let peers = Peers::new(&server);
    let attack = async {
        let mut endings = JoinSet::new();
        for _ in 0..CLIENTS {
            let connection = peers.greet(TOKEN).await.unwrap();
            for _ in 0..STREAMS {
                endings.spawn(squeeze(connection.clone()));
            }
        }
        while let Some(code) = endings.join_next().await {
            let code = code.unwrap();
            assert!(matches!(code, Code::ResourceExhausted | Code::DeadlineExceeded), "{code:?}");
        }
    };
    // A buffer that grows is there twice for a moment; 8 MiB are a connection's window, 2 its datagrams.
    let growth = 2 * TOTAL_BYTES + CLIENTS * (10 * MIB + CONNECTION) + SLACK;
    server.endures(server.options(), attack, growth).await;
}
