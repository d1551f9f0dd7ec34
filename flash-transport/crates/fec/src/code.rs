//! The block code: Reed–Solomon over GF(2^16), by `reed-solomon-simd`.

use bytes::Bytes;
use reed_solomon_simd::{Error, ReedSolomonDecoder, ReedSolomonEncoder};

use crate::layout::Layout;

/// Builds the code's tables, some milliseconds that the first message would else wait for.
pub fn warm_up() {
    let message = Bytes::from_static(&[1, 2, 3, 4]);
    let Ok(layout) = Layout::new(message.len(), 2) else { return };
    let restored = encode(&message, &layout, 0, 0..2).and_then(|repairs| {
        decode(&mut [0; 4], &layout, 0, &[false; 2], repairs.iter().map(Vec::as_slice).enumerate())
    });
    debug_assert_eq!(restored, Ok(()));
}

/// Source symbol `position` of a message, padded.
pub fn source(message: &[u8], layout: &Layout, position: usize, out: &mut Vec<u8>) {
    let start = position * layout.symbol_length;
    let end = (start + layout.symbol_length).min(message.len());
    out.extend_from_slice(&message[start..end]);
    out.resize(out.len() + layout.symbol_length - (end - start), 0);
}

/// Repair symbols `wanted` of a block.
pub fn encode(
    message: &Bytes,
    layout: &Layout,
    block: usize,
    wanted: std::ops::Range<usize>,
) -> Result<Vec<Vec<u8>>, Error> {
    let mut encoder = ReedSolomonEncoder::new(layout.block_sources(block), layout.repairs, layout.symbol_length)?;
    let mut padded = Vec::new();
    for position in (block..layout.sources).step_by(layout.blocks) {
        let start = position * layout.symbol_length;
        if let Some(symbol) = message.get(start..start + layout.symbol_length) {
            encoder.add_original_shard(symbol)?;
        } else {
            source(message, layout, position, &mut padded);
            encoder.add_original_shard(&padded)?;
        }
    }
    let repairs = encoder.encode()?;
    Ok(wanted.filter_map(|repair| repairs.recovery(repair).map(<[u8]>::to_vec)).collect())
}

/// Restores the sources of a block that `have` does not name, in place. `repairs` are (number, symbol) of this block, as
/// many as sources are missing or more.
pub fn decode<'a>(
    padded: &mut [u8],
    layout: &Layout,
    block: usize,
    have: &[bool],
    repairs: impl Iterator<Item = (usize, &'a [u8])>,
) -> Result<(), Error> {
    let symbol = |position: usize| position * layout.symbol_length..(position + 1) * layout.symbol_length;
    let mut decoder = ReedSolomonDecoder::new(layout.block_sources(block), layout.repairs, layout.symbol_length)?;
    for (index, position) in (block..layout.sources).step_by(layout.blocks).enumerate() {
        if have[position] {
            decoder.add_original_shard(index, &padded[symbol(position)])?;
        }
    }
    for (number, repair) in repairs {
        decoder.add_recovery_shard(number, repair)?;
    }
    for (index, restored) in decoder.decode()?.restored_original_iter() {
        padded[symbol(index * layout.blocks + block)].copy_from_slice(restored);
    }
    Ok(())
}
