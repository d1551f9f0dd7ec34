//! The Python extension `openpi_flash_transport`: what of the Python client is Rust. Its types stand in
//! `openpi_flash_transport.pyi`; robots use it through `openpi_flash_client`.

mod client;
mod pictures;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The QUIC client, and the preparing of pictures.
#[pymodule]
mod openpi_flash_transport {
    #[pymodule_export]
    use crate::client::{Call, Client, TransportError};
    #[pymodule_export]
    use crate::pictures::{Camera, PictureError, prepare};
}

fn invalid(error: &impl ToString) -> PyErr {
    PyValueError::new_err(error.to_string())
}
