//! The client for programs without a runtime of their own.

use std::time::Duration;

use bytes::Bytes;
use openpi_flash_wire::Method;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::{Answer, Call, Error, Options};

/// Longest that closing waits for the server to be told.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A client with a thread of its own, on which the connection is kept while no call is made. Methods may be called from
/// several threads at once.
pub struct Client {
    runtime: Runtime,
    client: crate::Client,
}

impl Client {
    /// As [`crate::Client::connect`].
    pub fn connect(options: Options) -> Result<Self, Error> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("flash-transport")
            .enable_all()
            .build()
            .map_err(|error| Error::Invalid(format!("no thread for the client: {error}")))?;
        let client = runtime.block_on(crate::Client::connect(options))?;
        Ok(Self { runtime, client })
    }

    /// The client as it is used within a runtime; its futures may be driven by any.
    pub fn inner(&self) -> &crate::Client {
        &self.client
    }

    /// As [`crate::Client::infer`].
    pub fn infer(&self, body: Bytes, call: Call) -> Result<Answer, Error> {
        self.call(Method::Infer, body, call)
    }

    /// As [`crate::Client::reset`].
    pub fn reset(&self, call: Call) -> Result<(), Error> {
        self.runtime.block_on(self.client.reset(call))
    }

    /// As [`crate::Client::metadata`].
    pub fn metadata(&self, call: Call) -> Result<Answer, Error> {
        self.runtime.block_on(self.client.metadata(call))
    }

    /// As [`crate::Client::call`].
    pub fn call(&self, method: Method, body: Bytes, call: Call) -> Result<Answer, Error> {
        self.runtime.block_on(self.client.call(method, body, call))
    }

    /// As [`crate::Client::close`], but for half a second at most.
    pub fn close(&self) {
        let _ = self.runtime.block_on(async { timeout(CLOSE_TIMEOUT, self.client.close()).await });
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}
