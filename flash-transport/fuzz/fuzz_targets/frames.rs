//! Hello, request and response frames, in pieces whose size the first byte gives: read or refused, never more memory
//! than arrived, the same whatever the pieces, and written again as they were read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use openpi_flash_wire::{Decoder, Frame, Header, Hello, Request, Response, WireError, encode};

const LIMIT: usize = 1 << 20;

fn read<H: Header>(bytes: &[u8], piece: usize) -> Result<Frame<H>, WireError> {
    let mut decoder = Decoder::new(LIMIT);
    for piece in bytes.chunks(piece) {
        decoder.push(piece)?;
        assert!(decoder.missing() <= LIMIT);
    }
    decoder.finish()
}

fn check<H: Header + PartialEq + std::fmt::Debug>(bytes: &[u8], piece: usize) {
    let whole = read::<H>(bytes, bytes.len().max(1));
    let pieces = read::<H>(bytes, piece);
    assert_eq!(whole.is_ok(), pieces.is_ok());
    if let Ok(frame) = whole {
        assert_eq!(frame.header, pieces.unwrap().header);
        let mut again = encode(&frame.header).unwrap().to_vec();
        again.extend_from_slice(&frame.body);
        assert_eq!(read::<H>(&again, again.len()).unwrap(), frame);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((piece, bytes)) = data.split_first() else { return };
    let piece = usize::from(*piece).max(1);
    check::<Hello>(bytes, piece);
    check::<Request>(bytes, piece);
    check::<Response>(bytes, piece);
});
