//! How a message is cut into symbols and blocks. Both ends derive it from two lengths, so that no more can disagree.

use crate::{FecError, MAX_MESSAGE_LENGTH};

/// Most source symbols of a message: 16 MiB in symbols of 1 KiB.
const MAX_SOURCES: usize = 16 << 10;

/// Most source symbols of a block. With the 256 repair symbols that it may have, a power of two, which is what decoding
/// costs; 768 datagrams hold a megabyte, so that an observation is one block.
const MAX_BLOCK_SOURCES: usize = 768;

/// Most blocks of a message.
pub const MAX_BLOCKS: usize = MAX_SOURCES.div_ceil(MAX_BLOCK_SOURCES);

/// A message's symbols. Source `i` of the message is source `i / blocks` of block `i % blocks`, so that a burst of losses
/// is shared by all blocks. In the order of sending, a symbol's *position*, the sources come first, then the first
/// repair symbol of every block, then the second of every block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub message_length: usize,
    /// Even, as the code wants it. The last source is padded with zeros.
    pub symbol_length: usize,
    pub sources: usize,
    pub blocks: usize,
    /// Repair symbols that a block has at most, the power of two from a quarter of its sources up.
    pub repairs: usize,
}

impl Layout {
    /// Symbols as equal and as long as `max_symbol_length` permits.
    pub fn fit(message_length: usize, max_symbol_length: usize) -> Result<Self, FecError> {
        let longest = max_symbol_length & !1;
        if longest == 0 {
            return Err(FecError::Range("datagram size"));
        }
        let sources = message_length.div_ceil(longest).max(1);
        Self::new(message_length, message_length.div_ceil(sources).next_multiple_of(2))
    }

    /// The layout of a message of `message_length` bytes in symbols of `symbol_length`.
    pub fn new(message_length: usize, symbol_length: usize) -> Result<Self, FecError> {
        if !(1..=MAX_MESSAGE_LENGTH).contains(&message_length) {
            return Err(FecError::Range("message length"));
        }
        if symbol_length == 0 || symbol_length % 2 == 1 {
            return Err(FecError::Range("symbol length"));
        }
        let sources = message_length.div_ceil(symbol_length);
        if sources > MAX_SOURCES || symbol_length > message_length.next_multiple_of(2) {
            return Err(FecError::Range("symbol length"));
        }
        let blocks = sources.div_ceil(MAX_BLOCK_SOURCES);
        let repairs = (sources.div_ceil(blocks) / 4).max(8).next_power_of_two();
        Ok(Self { message_length, symbol_length, sources, blocks, repairs })
    }

    /// Source symbols of a block.
    pub fn block_sources(&self, block: usize) -> usize {
        (self.sources - block).div_ceil(self.blocks)
    }

    /// Symbols of all blocks, sources and repairs.
    pub fn symbols(&self) -> usize {
        self.flight(self.repairs)
    }

    /// Symbols sent when every block gets `repairs` repair symbols.
    pub fn flight(&self, repairs: usize) -> usize {
        self.sources + repairs * self.blocks
    }

    /// Position of symbol `index` of a block, sources first; `None` when the block has no such symbol.
    pub fn position(&self, block: usize, index: usize) -> Option<usize> {
        if block >= self.blocks {
            return None;
        }
        let sources = self.block_sources(block);
        if index < sources {
            return Some(index * self.blocks + block);
        }
        let repair = index - sources;
        (repair < self.repairs).then(|| self.sources + repair * self.blocks + block)
    }

    /// Block and index of the symbol at a position.
    pub fn symbol(&self, position: usize) -> (usize, usize) {
        if position < self.sources {
            return (position % self.blocks, position / self.blocks);
        }
        let (repair, block) = ((position - self.sources) / self.blocks, (position - self.sources) % self.blocks);
        (block, self.block_sources(block) + repair)
    }

    /// Most bytes that a receiver holds of the message.
    pub fn memory(&self) -> usize {
        self.symbols() * self.symbol_length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_is_one_block() {
        let layout = Layout::fit(452_000, 1400).unwrap();
        assert_eq!((layout.sources, layout.blocks, layout.repairs), (323, 1, 128));
        assert_eq!(layout.symbol_length, 1400);
        let reply = Layout::fit(3000, 1400).unwrap();
        assert_eq!((reply.sources, reply.symbol_length, reply.repairs), (3, 1000, 8));
    }

    #[test]
    fn positions_and_symbols_are_each_others_inverse() {
        for length in [1, 2, 1000, 452_000, 1_075_201, 2_764_800, MAX_MESSAGE_LENGTH] {
            let layout = Layout::fit(length, 1386).unwrap();
            assert!(layout.blocks <= MAX_BLOCKS);
            assert!(layout.block_sources(0) <= MAX_BLOCK_SOURCES);
            let total: usize = (0..layout.blocks).map(|block| layout.block_sources(block)).sum();
            assert_eq!(total, layout.sources);
            for position in 0..layout.symbols() {
                let (block, index) = layout.symbol(position);
                assert_eq!(layout.position(block, index), Some(position));
            }
            assert_eq!(layout.position(layout.blocks, 0), None);
            assert_eq!(layout.position(0, layout.block_sources(0) + layout.repairs), None);
        }
    }

    #[test]
    fn lengths_out_of_range_are_refused() {
        assert!(Layout::new(0, 1000).is_err());
        assert!(Layout::new(MAX_MESSAGE_LENGTH + 1, 1400).is_err());
        assert!(Layout::new(1000, 0).is_err());
        assert!(Layout::new(1000, 999).is_err());
        assert!(Layout::new(1000, 1002).is_err());
        assert!(Layout::new(MAX_MESSAGE_LENGTH, 512).is_err());
        assert!(Layout::fit(1000, 1).is_err());
    }
}
