//! `PolicyService` over gRPC with bodies that stay serialized.

mod server;

use bytes::{Buf, BufMut, Bytes};
use openpi_flash_wire::{Code, Method, Refusal};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::{BinaryMetadataValue, MetadataMap};
use tonic::{Code as GrpcCode, Status};

pub use server::{CallContext, Handler, PolicyServer};

/// The service's full name.
pub const SERVICE: &str = "openpi_flash.v1.PolicyService";

/// Path of the bidirectional stream of inferences.
pub const INFER_STREAM: &str = "/openpi_flash.v1.PolicyService/InferStream";

/// Path of a unary method.
pub fn path(method: Method) -> &'static str {
    match method {
        Method::Infer => "/openpi_flash.v1.PolicyService/Infer",
        Method::Reset => "/openpi_flash.v1.PolicyService/Reset",
        Method::GetMetadata => "/openpi_flash.v1.PolicyService/GetMetadata",
    }
}

/// Trailing metadata of a failed call: path of the offending field, in UTF-8.
const FIELD_KEY: &str = "openpi-error-field-bin";

/// A serialized message in two pieces.
#[derive(Debug, Clone, Default)]
pub struct Raw {
    /// What was put before the body.
    pub head: Bytes,
    /// The body, as it came.
    pub body: Bytes,
}

impl From<Bytes> for Raw {
    fn from(body: Bytes) -> Self {
        Self { head: Bytes::new(), body }
    }
}

/// Passes messages on as they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawCodec;

impl Codec for RawCodec {
    type Encode = Raw;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Raw;
    type Error = Status;

    fn encode(&mut self, item: Raw, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(item.head.len() + item.body.len());
        out.put_slice(&item.head);
        out.put_slice(&item.body);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Why a gRPC call has no answer.
pub fn refusal(status: &Status) -> Refusal {
    let field = status.metadata().get_bin(FIELD_KEY).and_then(|value| value.to_bytes().ok()).unwrap_or_default();
    Refusal {
        code: Code::from_number(status.code() as u32),
        message: status.message().to_owned(),
        field: String::from_utf8_lossy(&field).into_owned(),
    }
}

/// The same as a gRPC status.
pub fn status(refusal: &Refusal) -> Status {
    let mut metadata = MetadataMap::new();
    if !refusal.field.is_empty() {
        metadata.insert_bin(FIELD_KEY, BinaryMetadataValue::from_bytes(refusal.field.as_bytes()));
    }
    Status::with_metadata(GrpcCode::from_i32(refusal.code as i32), &refusal.message, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_grpc() {
        let original = Refusal { code: Code::InvalidArgument, message: "no".into(), field: "images/é".into() };
        assert_eq!(refusal(&status(&original)), original);
    }
}
