//! The client of the QUIC transport, for threads that wait and for event loops.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openpi_flash_client::{Answer, Certified, Error, Method, Options, Trust};
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tokio::runtime::{Builder, Runtime};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::invalid;
use crate::pictures::{Message, Picture, Unprepared};

pyo3::create_exception!(
    openpi_flash_transport,
    TransportError,
    PyException,
    "There is no answer: a gRPC status number, a message, and the offending field or an empty string."
);

/// How often a call that waits looks whether the user wants to interrupt it.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Longest that closing waits for the server to be told.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A call waits for a connection as long as for its answer: this is more than either.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// A client that keeps its connection in a thread of its own, and may be used by several threads at once.
#[pyclass(frozen, module = "openpi_flash_transport")]
pub struct Client {
    shared: Mutex<Option<Arc<Shared>>>,
}

/// What calls hold on to, so that closing the client takes nothing from under them.
struct Shared {
    client: openpi_flash_client::Client,
    num_lost: AtomicU64,
    runtime: Option<Runtime>,
}

#[pymethods]
impl Client {
    #[new]
    #[pyo3(signature = (
        host, port, *, server_name = None, ca_file = None, fingerprint = None, insecure_skip_verify = false,
        client_cert_file = None, client_key_file = None, token = None
    ))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "keywords in Python")]
    fn new(
        host: &str,
        port: u16,
        server_name: Option<String>,
        ca_file: Option<PathBuf>,
        fingerprint: Option<&str>,
        insecure_skip_verify: bool,
        client_cert_file: Option<PathBuf>,
        client_key_file: Option<PathBuf>,
        token: Option<String>,
    ) -> PyResult<Self> {
        let mut options = Options::new(host, port);
        options.server_name = server_name;
        options.trust = match (ca_file, fingerprint, insecure_skip_verify) {
            (None, None, false) => Trust::SystemRoots,
            (Some(path), None, false) => Trust::CaFile(path),
            (None, Some(digits), false) => Trust::Fingerprint(digits.parse().map_err(|error| invalid(&error))?),
            (None, None, true) => Trust::InsecureAnyCertificate,
            _ => {
                let problem = "at most one of ca_file, fingerprint and insecure_skip_verify says whom to trust";
                return Err(PyValueError::new_err(problem));
            }
        };
        options.certificate = match (client_cert_file, client_key_file) {
            (None, None) => None,
            (Some(chain), Some(key)) => Some(Certified::load(&chain, &key).map_err(|error| invalid(&error))?),
            _ => return Err(PyValueError::new_err("client_cert_file and client_key_file go together")),
        };
        options.token = token.unwrap_or_default();
        options.connect_timeout = CONNECT_TIMEOUT;
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("flash-transport").enable_all().build()?;
        let client = {
            let _entered = runtime.enter();
            openpi_flash_client::Client::new(options).map_err(|error| invalid(&error))?
        };
        let shared = Arc::new(Shared { client, num_lost: AtomicU64::new(0), runtime: Some(runtime) });
        shared.count_lost();
        Ok(Self { shared: Mutex::new(Some(shared)) })
    }

    /// Connections that were lost so far: after each the server may be another.
    #[getter]
    fn num_lost(&self) -> u64 {
        self.shared().map_or(0, |shared| shared.num_lost.load(Ordering::Relaxed))
    }

    /// Whether there is a connection.
    #[getter]
    fn connected(&self) -> bool {
        self.shared().is_ok_and(|shared| *shared.client.connected().borrow())
    }

    /// Waits for an answer. The interpreter's lock is free meanwhile, and signals are handled.
    #[pyo3(signature = (method, head, pictures, *, timeout_s, traceparent = ""))]
    fn call<'py>(
        &self,
        py: Python<'py>,
        method: &str,
        head: &[u8],
        pictures: Vec<Picture<'py>>,
        timeout_s: f64,
        traceparent: &str,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (shared, method, call) = (self.shared()?, parse_method(method)?, options(timeout_s, traceparent)?);
        let message = Message::gather(py, head, pictures, shared.client.rate())?;
        let answer = py.detach(|| {
            let body = message.finish()?.into();
            shared.wait(shared.client.call(method, body, call))?.map_err(PyErr::from_transport)
        });
        answer.map(|answer| PyBytes::new(py, &answer.body))
    }

    /// Begins a call and returns at once. `done(answer, error)` is called in another thread when it has ended, one of
    /// the two being None.
    #[pyo3(signature = (method, head, pictures, done, *, timeout_s, traceparent = ""))]
    #[allow(clippy::too_many_arguments, reason = "keywords in Python")]
    fn start<'py>(
        &self,
        py: Python<'py>,
        method: &str,
        head: &[u8],
        pictures: Vec<Picture<'py>>,
        done: Py<PyAny>,
        timeout_s: f64,
        traceparent: &str,
    ) -> PyResult<Call> {
        let (shared, method, call) = (self.shared()?, parse_method(method)?, options(timeout_s, traceparent)?);
        let message = Message::gather(py, head, pictures, shared.client.rate())?;
        let runtime = shared.runtime().handle().clone();
        let task = runtime.spawn(async move {
            // Preparing and calling back may take long, and the connection lives in this thread.
            let prepared = if message.is_ready() {
                message.finish()
            } else {
                let Ok(prepared) = tokio::task::spawn_blocking(move || message.finish()).await else { return };
                prepared
            };
            let outcome = match prepared {
                Ok(body) => shared.client.call(method, body.into(), call).await.map_err(Failure::Call),
                Err(error) => Err(Failure::Pictures(error)),
            };
            // Until then the runtime is held, which would else be gone with the client, and the caller never told.
            let _ = tokio::task::spawn_blocking(move || call_back(&done, outcome)).await;
            drop(shared);
        });
        Ok(Call { task: task.abort_handle() })
    }

    /// Ends the connection and every call, and waits a moment until the server has been told.
    fn close(&self, py: Python<'_>) {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(shared) = shared else { return };
        py.detach(|| {
            let closed = async { timeout(CLOSE_TIMEOUT, shared.client.close()).await };
            let _ = shared.runtime().block_on(closed);
        });
    }
}

impl Client {
    fn shared(&self) -> PyResult<Arc<Shared>> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.clone().ok_or_else(|| PyErr::from_transport(Error::Invalid("the client is closed".into())))
    }
}

impl Shared {
    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("taken only when this is dropped")
    }

    fn count_lost(self: &Arc<Self>) {
        let (shared, mut connected) = (Arc::downgrade(self), self.client.connected());
        self.runtime().spawn(async move {
            while connected.changed().await.is_ok() {
                let Some(shared) = shared.upgrade() else { return };
                if !*connected.borrow_and_update() {
                    shared.num_lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    /// Waits for a result, and every now and then handles signals, whose exception ends the wait.
    fn wait<T>(&self, work: impl Future<Output = T>) -> PyResult<T> {
        let mut work = pin!(work);
        loop {
            match self.runtime().block_on(async { timeout(SIGNAL_INTERVAL, &mut work).await }) {
                Ok(result) => return Ok(result),
                Err(_) => handle_signals()?,
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Threads that wait for the interpreter's lock, which may be held here, are not waited for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A call that has been begun.
#[pyclass(frozen, module = "openpi_flash_transport")]
pub struct Call {
    task: AbortHandle,
}

#[pymethods]
impl Call {
    /// Ends it; the server drops the work. `done` is not called unless it is being called already.
    fn cancel(&self) {
        self.task.abort();
    }
}

enum Failure {
    Call(Error),
    Pictures(Unprepared),
}

/// Nothing happens where the interpreter is ending, or the event loop behind `done` has been closed.
fn call_back(done: &Py<PyAny>, outcome: Result<Answer, Failure>) {
    Python::try_attach(|py| {
        let (answer, error) = match outcome {
            Ok(answer) => (Some(PyBytes::new(py, &answer.body)), None),
            Err(Failure::Call(error)) => (None, Some(PyErr::from_transport(error))),
            Err(Failure::Pictures(error)) => (None, Some(error.into())),
        };
        let _ = done.call1(py, (answer, error));
    });
}

fn parse_method(name: &str) -> PyResult<Method> {
    match name {
        "Infer" => Ok(Method::Infer),
        "Reset" => Ok(Method::Reset),
        "GetMetadata" => Ok(Method::GetMetadata),
        _ => Err(PyValueError::new_err(format!("method: {name:?} is not one of Infer, Reset and GetMetadata"))),
    }
}

fn options(timeout_s: f64, traceparent: &str) -> PyResult<openpi_flash_client::Call> {
    let timeout = Duration::try_from_secs_f64(timeout_s.max(0.0))
        .map_err(|_| PyValueError::new_err(format!("timeout_s: {timeout_s}; a number of seconds is expected")))?;
    let timeout = Some(timeout.min(CONNECT_TIMEOUT));
    Ok(openpi_flash_client::Call { timeout, traceparent: traceparent.to_owned(), ..Default::default() })
}

#[allow(clippy::redundant_closure_for_method_calls, reason = "the method itself has too narrow a lifetime")]
fn handle_signals() -> PyResult<()> {
    Python::attach(|py| py.check_signals())
}

/// Errors of this library as Python's.
trait FromTransport {
    fn from_transport(error: Error) -> Self;
}

impl FromTransport for PyErr {
    fn from_transport(error: Error) -> Self {
        let (code, field) = (error.code() as u8, error.field().to_owned());
        let message = match error {
            Error::Refused(refusal) => refusal.message,
            Error::DeadlineExceeded { .. } => String::new(), // whoever set the time says it better
            other => other.to_string(),
        };
        TransportError::new_err((code, message, field))
    }
}
