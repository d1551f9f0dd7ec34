//! A gateway that answers as the tests want, an edge in front of it, and clients of it.

#![allow(dead_code)] // each test file uses its part

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use openpi_flash_client::{Certified, Client, Options, Trust};
use openpi_flash_edge::{
    Edge, EndpointSettings, Identity, Limits, Metrics, Settings, Timeouts, Tokens, UpstreamSettings,
};
use openpi_flash_grpc::{CallContext, Handler, PolicyServer};
use openpi_flash_quic::Tuning;
use openpi_flash_traces::Traces;
use openpi_flash_wire::protobuf::put_length;
use openpi_flash_wire::{Code, Method, Refusal};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// An inference with this body is answered when `Gateway::release` is called.
pub const HOLD: &[u8] = b"\x12\x04hold";
/// An inference with this body is refused.
pub const REFUSE: &[u8] = b"\x12\x06refuse";

/// What the tests see of the gateway.
#[derive(Default)]
pub struct Gateway {
    pub started: AtomicUsize,
    pub dropped: AtomicUsize,
    pub changed: Notify,
    pub release: Notify,
    pub contexts: std::sync::Mutex<Vec<CallContext>>,
    pub bodies: std::sync::Mutex<Vec<(Method, Bytes)>>,
}

impl Gateway {
    /// Resolves when `holds` of this gateway is true.
    pub async fn wait(&self, holds: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            if holds(self) {
                return;
            }
            changed.await;
        }
    }

    pub async fn wait_started(&self, count: usize) {
        self.wait(|gateway| gateway.started.load(Ordering::SeqCst) >= count).await;
    }
}

/// Answers each inference with its own body.
pub struct Echo(pub Arc<Gateway>);

struct Running<'a>(&'a Gateway, bool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
            self.0.changed.notify_waiters();
        }
    }
}

impl Handler for Echo {
    async fn call(&self, method: Method, body: Bytes, context: CallContext) -> Result<Bytes, Refusal> {
        self.0.contexts.lock().unwrap().push(context);
        self.0.bodies.lock().unwrap().push((method, body.clone()));
        let mut running = Running(&self.0, false);
        let released = self.0.release.notified();
        self.0.started.fetch_add(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
        if body.ends_with(HOLD) {
            released.await;
        }
        running.1 = true;
        if body.ends_with(REFUSE) {
            return Err(Refusal {
                code: Code::InvalidArgument,
                message: "no such camera".into(),
                field: "images/a".into(),
            });
        }
        Ok(if method == Method::Infer { body } else { Bytes::from_static(b"\x12\x01m") })
    }
}

/// Serves a gateway at the socket of a folder.
pub fn serve_gateway(folder: &Path, handler: impl Handler) -> JoinHandle<()> {
    let listener = UnixListener::bind(folder.join("gateway.sock")).unwrap();
    let service = PolicyServer::new(handler, 64 << 20, std::future::pending());
    tokio::spawn(async move {
        let incoming = UnixListenerStream::new(listener);
        Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    })
}

/// Gateway and edge, and where they keep their files.
pub struct World {
    pub gateway: Arc<Gateway>,
    pub folder: TempDir,
    pub address: SocketAddr,
    pub metrics: Arc<Metrics>,
    stop: Option<oneshot::Sender<()>>,
    edge: Option<JoinHandle<()>>,
    upstream: JoinHandle<()>,
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// A world whose edge has other settings.
    pub async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let gateway = Arc::new(Gateway::default());
        let upstream = serve_gateway(folder.path(), Echo(Arc::clone(&gateway)));
        let mut settings = settings(&folder, ([127, 0, 0, 1], 0).into());
        change(&mut settings);
        let edge = Edge::bind(settings).await.unwrap();
        let (address, metrics) = (edge.addresses().unwrap()[0].1, edge.metrics());
        let mut world = Self { gateway, folder, address, metrics, stop: None, edge: None, upstream };
        world.run(edge);
        world
    }

    fn run(&mut self, edge: Edge) {
        let (stop, stopped) = oneshot::channel::<()>();
        self.stop = Some(stop);
        self.edge = Some(tokio::spawn(edge.serve(async {
            let _ = stopped.await;
        })));
    }

    /// Has the edge drain; the task ends when it has.
    pub fn drain(&mut self) -> JoinHandle<()> {
        self.stop.take().unwrap().send(()).unwrap();
        self.edge.take().unwrap()
    }

    /// Kills the edge as SIGKILL would: nothing is said to anybody.
    pub async fn kill(&mut self) {
        let edge = self.edge.take().unwrap();
        edge.abort();
        let _ = edge.await;
    }

    /// Starts an edge at the same address with the same files.
    pub async fn restart(&mut self) {
        let edge = loop {
            // The endpoint's own task may hold the port a moment longer.
            match Edge::bind(settings(&self.folder, self.address)).await {
                Ok(edge) => break edge,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        self.metrics = edge.metrics();
        self.run(edge);
    }

    /// Options of a client that trusts the edge.
    pub fn options(&self) -> Options {
        let mut options = Options::new("127.0.0.1", self.address.port());
        options.trust = Trust::CaFile(self.certificate());
        options
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.options()).await.unwrap()
    }

    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join("edge-cert.pem")
    }

    /// A file of this world.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.upstream.abort();
    }
}

pub fn settings(folder: &TempDir, listen: SocketAddr) -> Settings {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let address = format!("unix:{}", folder.path().join("gateway.sock").display());
    Settings {
        endpoints: vec![EndpointSettings {
            slot: "action",
            listen,
            upstream: UpstreamSettings { address, ca_file: None, token: None },
        }],
        identity: Identity::load_or_create(folder.path(), None, &names).unwrap(),
        client_ca: None,
        tokens: None,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
        tuning: Tuning { keep_alive: None, idle_timeout: Duration::from_secs(10), ..Tuning::default() },
        metrics: None,
        traces: Traces::default(),
    }
}

/// Tokens of a file with one.
pub fn tokens(token: &str) -> Tokens {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens");
    std::fs::write(&path, format!("{token}\n")).unwrap();
    Tokens::load(&path).unwrap()
}

/// A field that the protobuf reader passes over, of `length` bytes: a body that any method takes.
pub fn body(length: usize) -> Bytes {
    let mut body = BytesMut::new();
    put_length(&mut body, 15, length);
    body.extend((0..length).map(|index| ((index * 31) >> 3) as u8));
    body.freeze()
}

/// An authority, and files of a certificate that it signed.
pub fn authority(folder: &Path) -> (PathBuf, Certified) {
    let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let own = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["robot".into()]).unwrap().signed_by(&own, &issuer).unwrap();
    let write = |name: &str, content: String| {
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let ca = write("ca.pem", authority.pem());
    let files = (write("robot.pem", certificate.pem()), write("robot.key", own.serialize_pem()));
    (ca, Certified::load(&files.0, &files.1).unwrap())
}
