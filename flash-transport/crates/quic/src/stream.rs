//! Frames on QUIC streams.

use bytes::Bytes;
use openpi_flash_wire::{Decoder, Frame, Header, WireError, encode};
use quinn::{ReadError, RecvStream, SendStream, WriteError};

/// Chunks, each at most a datagram, that are taken from a stream at once.
const CHUNKS: usize = 64;

/// Why a frame was not read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadFault {
    /// The peer sent something else.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream or its connection ended.
    #[error(transparent)]
    Stream(#[from] ReadError),
}

/// Why a frame was not written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteFault {
    /// The header cannot be written.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream or its connection ended.
    #[error(transparent)]
    Stream(#[from] WriteError),
}

/// Gives what has arrived to the decoder, waiting for the first byte of it. Returns how many bytes that were; none at
/// the end of the stream. Nothing is lost when the future is dropped.
pub async fn read_some<H: Header>(
    stream: &mut RecvStream,
    decoder: &mut Decoder<H>,
) -> Result<Option<usize>, ReadFault> {
    let mut chunks = [const { Bytes::new() }; CHUNKS];
    let Some(count) = stream.read_chunks(&mut chunks).await? else { return Ok(None) };
    for chunk in &chunks[..count] {
        decoder.push(chunk)?;
    }
    Ok(Some(chunks[..count].iter().map(Bytes::len).sum()))
}

/// Reads the one frame of a stream.
pub async fn read_frame<H: Header>(stream: &mut RecvStream, max_body_length: usize) -> Result<Frame<H>, ReadFault> {
    let mut decoder = Decoder::new(max_body_length);
    while read_some(stream, &mut decoder).await?.is_some() {}
    Ok(decoder.finish()?)
}

/// Writes the one frame of a stream and ends it. The body is not copied.
pub async fn write_frame<H: Header>(stream: &mut SendStream, header: &H, body: Bytes) -> Result<(), WriteFault> {
    write(stream, &mut [encode(header)?, body]).await?;
    // It fails for a stream that is ended or reset, and this one is neither.
    let _ = stream.finish();
    Ok(())
}

/// Writes to a stream. A peer that stops the stream ends the writing, too where both wait for room in the connection's
/// window: there quinn's own write would go on waiting.
pub async fn write(stream: &mut SendStream, chunks: &mut [Bytes]) -> Result<(), WriteError> {
    let stopped = stream.stopped();
    tokio::select! {
        biased;
        written = stream.write_all_chunks(chunks) => written,
        Ok(Some(code)) = stopped => Err(WriteError::Stopped(code)),
    }
}
