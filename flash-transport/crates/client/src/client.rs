//! The client: which connection a request takes, and when it is sent again.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use openpi_flash_quic::Tuning;
use openpi_flash_quic::messages::warm_up;
use openpi_flash_quic::tls::{Certified, Trust, client as tls_config};
use openpi_flash_wire::envelope::reset_request;
use openpi_flash_wire::{MAX_BODY_LENGTH, Method, Request};
use quinn::ClientConfig;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::Error;
use crate::link::{Fault, Link, Path};

/// Head start of one of a host's addresses over the next.
const ADDRESS_STAGGER: Duration = Duration::from_millis(100);

/// Pauses between attempts to connect again: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How a client reaches its server.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name or address of the server.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// Name that the server's certificate must have; none: `host`.
    pub server_name: Option<String>,
    /// Which servers are trusted.
    pub trust: Trust,
    /// Shown to a server that asks clients for a certificate.
    pub certificate: Option<Certified>,
    /// Bearer token; empty: none.
    pub token: String,
    /// Session of calls that name none; none: one of this client's own, which outlives its connections.
    pub session: Option<String>,
    /// Longest that a call waits for a connection.
    pub connect_timeout: Duration,
    /// Time of a call that has none of its own.
    pub call_timeout: Duration,
    /// Largest answer, in bytes.
    pub max_answer_bytes: usize,
    /// Of QUIC.
    pub tuning: Tuning,
}

impl Options {
    /// The defaults for a server.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
            server_name: None,
            trust: Trust::default(),
            certificate: None,
            token: String::new(),
            session: None,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            max_answer_bytes: MAX_BODY_LENGTH,
            tuning: Tuning::default(),
        }
    }
}

/// What one call has besides its body.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// Time that it has; none: the client's.
    pub timeout: Option<Duration>,
    /// Session, where the body names none; none: the client's.
    pub session: Option<String>,
    /// W3C trace context; empty: none.
    pub traceparent: String,
    /// W3C trace context; empty: none.
    pub tracestate: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The serialized message.
    pub body: Bytes,
    /// Time from the request's last byte to the answer's first at the server.
    pub server_time: Duration,
}

/// A server's client. Cheap to clone; the last clone that is dropped ends the connection.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: Options,
    config: ClientConfig,
    server: Arc<str>,
    session: String,
    connected: watch::Sender<bool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Pending>,
    /// The one of the host's addresses that answered last.
    address: Option<SocketAddr>,
    /// What the last connection has found the path to be like.
    path: Option<Path>,
    closed: bool,
}

impl State {
    /// What the connection in hand has found its path to be like.
    fn found(&self) -> Option<Path> {
        self.link.as_ref()?.peek()?.as_ref().ok()?.path()
    }
}

/// A connection, perhaps still being made. Being made goes on when nobody waits for it.
type Pending = Shared<BoxFuture<'static, Result<Arc<Link>, Error>>>;

impl Client {
    /// A client that connects in the background, and again whenever the connection is lost. Called within a tokio
    /// runtime.
    pub fn new(options: Options) -> Result<Self, Error> {
        warm_up();
        let crypto = tls_config(&options.trust, options.certificate.as_ref())?;
        let config = ClientConfig::new(Arc::new(crypto));
        let session = options.session.clone().unwrap_or_else(|| format!("client-{:016x}", fastrand::u64(..)));
        let server = format!("{}:{}", options.host, options.port).into();
        let connected = watch::Sender::new(false);
        let inner = Arc::new(Inner { options, config, server, session, connected, state: Mutex::default() });
        tokio::spawn(stay_connected(Arc::downgrade(&inner)));
        Ok(Self { inner })
    }

    /// The same, once there is a connection and it is known what it carries.
    pub async fn connect(options: Options) -> Result<Self, Error> {
        let client = Self::new(options)?;
        let link = client.inner.link().await?;
        link.confirmed().await;
        link.explored().await;
        link.refused().map_or(Ok(client), Err)
    }

    /// The session of calls that name none.
    pub fn session(&self) -> &str {
        &self.inner.session
    }

    /// Whether there is a connection, as it changes.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.inner.connected.subscribe()
    }

    /// Bytes per second that the path is taken to carry; none before that was explored.
    pub fn rate(&self) -> Option<f64> {
        let state = self.inner.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.found().or(state.path)?.rate
    }

    /// Has the server answer a serialized `InferRequest` with a serialized `InferResponse`.
    pub async fn infer(&self, body: Bytes, call: Call) -> Result<Answer, Error> {
        self.call(Method::Infer, body, call).await
    }

    /// Has the server forget the call's session.
    pub async fn reset(&self, call: Call) -> Result<(), Error> {
        let body = reset_request(call.session.as_deref().unwrap_or(&self.inner.session));
        self.call(Method::Reset, body, call).await.map(drop)
    }

    /// A serialized `GetMetadataResponse`.
    pub async fn metadata(&self, call: Call) -> Result<Answer, Error> {
        self.call(Method::GetMetadata, Bytes::new(), call).await
    }

    /// Any of the three; metadata, which are what a client asks for first, once it is known, too, what the connection
    /// carries. When this future is dropped, the server drops the work.
    pub async fn call(&self, method: Method, body: Bytes, call: Call) -> Result<Answer, Error> {
        let inner = &self.inner;
        let time = call.timeout.unwrap_or(inner.options.call_timeout);
        let by = Instant::now() + time;
        let body_length = u32::try_from(body.len()).ok().filter(|length| *length as usize <= MAX_BODY_LENGTH);
        let Some(body_length) = body_length else {
            return Err(Error::Invalid(format!("a request of {} bytes; at most {MAX_BODY_LENGTH} fit", body.len())));
        };
        let mut request = Request {
            session: call.session.unwrap_or_else(|| inner.session.clone()),
            traceparent: call.traceparent,
            tracestate: call.tracestate,
            ..Request::new(method, body_length)
        };
        match timeout_at(by, inner.call(&mut request, body, by)).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::DeadlineExceeded { timeout_ms: time.as_millis() as u64 }),
        }
    }

    /// Goes on from a new socket, as after a change of address that the system does not report.
    pub async fn rebind(&self) -> Result<(), Error> {
        let link = self.inner.link().await?;
        link.rebind().map_err(|error| self.inner.unavailable(error.to_string()))
    }

    /// Ends the connection; the next call, or this client by itself, begins another.
    pub async fn disconnect(&self) {
        if let Ok(link) = self.inner.link().await {
            link.close();
        }
    }

    /// Ends the connection, and every call with it, and waits until the server has been told.
    pub async fn close(&self) {
        if let Some(link) = self.inner.close() {
            link.closed().await;
        }
    }
}

impl Inner {
    async fn call(self: &Arc<Self>, request: &mut Request, body: Bytes, by: Instant) -> Result<Answer, Error> {
        let mut lost_before = false;
        let connected_by = Instant::now() + self.options.connect_timeout;
        loop {
            let link = self.link().await?;
            let left = by.saturating_duration_since(Instant::now()).as_millis();
            request.timeout_ms = u32::try_from(left).unwrap_or(u32::MAX).max(1);
            match link.request(request, body.clone(), self.options.max_answer_bytes).await {
                Ok(frame) => {
                    if request.method == Method::GetMetadata {
                        link.explored().await;
                    }
                    return match frame.header.refusal {
                        Some(refusal) => Err(refusal.into()),
                        None => Ok(Answer {
                            body: frame.body,
                            server_time: Duration::from_micros(frame.header.server_us.into()),
                        }),
                    };
                }
                Err(Fault::Untouched) => {}
                Err(Fault::Lost(error)) if lost_before || Instant::now() > connected_by => return Err(error),
                Err(Fault::Lost(error)) => {
                    tracing::info!("{error}; sending the request again");
                    lost_before = link.is_confirmed(); // or else there was no connection yet
                }
                Err(Fault::Final(error)) => return Err(error),
            }
        }
    }

    /// A connection, for which it waits as long as a call may.
    async fn link(self: &Arc<Self>) -> Result<Arc<Link>, Error> {
        let by = Instant::now() + self.options.connect_timeout;
        loop {
            let error = match timeout_at(by, self.pending()?).await {
                Ok(Ok(link)) if link.is_usable() => return Ok(link),
                Ok(Ok(_)) => continue,
                Ok(Err(error)) => error,
                Err(_) => self.unavailable(format!("no connection within {:?}", self.options.connect_timeout)),
            };
            if !error.is_passing() || Instant::now() + PAUSE.0 > by {
                return Err(error);
            }
            sleep(PAUSE.0).await;
        }
    }

    /// The connection that there is, or the one that is being made, which is begun where there is none.
    fn pending(self: &Arc<Self>) -> Result<Pending, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return Err(Error::Closed);
        }
        let usable = state.link.as_ref().filter(|link| match link.peek() {
            None => true,
            Some(Ok(link)) => link.is_usable(),
            Some(Err(_)) => false,
        });
        if let Some(link) = usable {
            return Ok(link.clone());
        }
        state.path = state.found().or(state.path);
        let task = tokio::spawn(connect(Arc::clone(self), state.path));
        let stopped = self.unavailable("the runtime is stopping".into());
        let link = task.map(|link| link.unwrap_or(Err(stopped))).boxed().shared();
        tokio::spawn(link.clone().map(drop)); // so that it is known to be made though nobody waits
        state.link = Some(link.clone());
        Ok(link)
    }

    fn unavailable(&self, reason: String) -> Error {
        Error::Unavailable { server: self.server.to_string(), reason }
    }

    /// Ends the connection and refuses another; what there was is returned.
    fn close(&self) -> Option<Arc<Link>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        let link = state.link.take()?.peek()?.as_ref().ok().cloned();
        link.inspect(|link| link.close())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

/// Connects, and again whenever the connection is lost, until the client is gone.
async fn stay_connected(inner: Weak<Inner>) {
    let mut pause = PAUSE.0;
    loop {
        let Some(Ok(pending)) = inner.upgrade().map(|inner| inner.pending()) else { return };
        let link = pending.await;
        let Some(connected) = inner.upgrade().map(|inner| inner.connected.clone()) else { return };
        match link {
            Ok(link) => {
                link.confirmed().await;
                if link.connection.close_reason().is_none() {
                    connected.send_replace(true);
                    pause = PAUSE.0;
                }
                let reason = link.connection.closed().await;
                connected.send_if_modified(std::mem::take);
                tracing::info!("connection ended: {reason}");
            }
            Err(error) => tracing::debug!("not connected: {error}"),
        }
        // Robots that lost one server should not come back as one.
        sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Connects to the address that answered last, or else to the host's first that answers.
async fn connect(inner: Arc<Inner>, path: Option<Path>) -> Result<Arc<Link>, Error> {
    let addresses = timeout(inner.options.connect_timeout, resolve(&inner)).await;
    let addresses = addresses.map_err(|_| inner.unavailable("its name was not resolved in time".into()))??;
    let known = inner.state.lock().unwrap_or_else(PoisonError::into_inner).address;
    let known = known.filter(|address| addresses.contains(address));
    let early = known.is_some() || addresses.len() == 1; // a connection at 0-RTT proves nothing about an address
    let mut attempts = JoinSet::new();
    for (index, address) in known.map_or(addresses, |known| vec![known]).into_iter().enumerate() {
        let inner = Arc::clone(&inner);
        attempts.spawn(async move {
            sleep(ADDRESS_STAGGER * index as u32).await;
            let server = Arc::clone(&inner.server);
            let link = Link::open(&inner.options, inner.config.clone(), address, server, early, path);
            link.await.map(|link| (address, Arc::new(link)))
        });
    }
    let mut failure = inner.unavailable("its name has no address".into());
    let mut found = None;
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(link)) => {
                found = Some(link);
                break;
            }
            Ok(Err(error)) if failure.is_passing() => failure = error,
            _ => {}
        }
    }
    let mut state = inner.state.lock().unwrap_or_else(PoisonError::into_inner);
    state.address = found.as_ref().map(|(address, _)| *address);
    match found {
        Some((_, link)) if state.closed => {
            link.close();
            Err(Error::Closed)
        }
        Some((_, link)) => Ok(link),
        None => Err(failure),
    }
}

async fn resolve(inner: &Inner) -> Result<Vec<SocketAddr>, Error> {
    let found = tokio::net::lookup_host((inner.options.host.as_str(), inner.options.port)).await;
    let found = found.map_err(|error| inner.unavailable(error.to_string()))?;
    Ok(found.collect())
}
