//! Pillow's bilinear filter on 8-bit RGB, to the bit.
//!
//! The pictures that a model was trained on were resized by Pillow, so that its rounding is part of the model's input.
//! What makes it Pillow's: an antialiased triangle, weights normalised in double precision and rounded to 22 fractional
//! bits, and two passes, each rounded to bytes.

use crate::Error;

/// Fractional bits of a weight. A byte times a weight, summed over a filter, still fits an `i32`.
const PRECISION_BITS: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// Scales interleaved RGB to fit into `to` and pads it with black; sizes are (height, width), none of them zero.
///
/// The aspect ratio is kept; the odd row or column of padding is at the bottom or at the right.
pub(crate) fn resize_with_pad(pixels: &[u8], from: (u32, u32), to: (u32, u32)) -> Result<Vec<u8>, Error> {
    let ratio = (f64::from(from.1) / f64::from(to.1)).max(f64::from(from.0) / f64::from(to.0));
    let scaled = |side: u32| (f64::from(side) / ratio) as usize;
    let (rows, columns) = (scaled(from.0), scaled(from.1));
    if rows == 0 || columns == 0 {
        return Err(Error::TooThin { from_height: from.0, from_width: from.1, height: to.0, width: to.1 });
    }
    let inside = resize(pixels, (from.0 as usize, from.1 as usize), (rows, columns));
    let (height, width) = (to.0 as usize, to.1 as usize);
    if (rows, columns) == (height, width) {
        return Ok(inside);
    }
    let (top, left) = ((height - rows) / 2, (width - columns) / 2);
    let mut out = vec![0; height * width * 3];
    for (out, row) in out.chunks_exact_mut(width * 3).skip(top).zip(inside.chunks_exact(columns * 3)) {
        out[left * 3..][..row.len()].copy_from_slice(row);
    }
    Ok(out)
}

fn resize(pixels: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
    // The order shows in the rounding. Since 13.0 Pillow shrinks the columns of a tall picture first, which is less work.
    let columns_first = from.0.saturating_sub(to.0) > 2 * from.1.saturating_sub(to.1);
    match (from.0 == to.0, from.1 == to.1) {
        (true, true) => pixels.to_vec(),
        (true, false) => resize_rows(pixels, from.1, to.1),
        (false, true) => resize_columns(pixels, from, to.0),
        (false, false) if columns_first => resize_rows(&resize_columns(pixels, from, to.0), from.1, to.1),
        (false, false) => resize_columns(&resize_rows(pixels, from.1, to.1), (from.0, to.1), to.0),
    }
}

/// The filter of one axis: which inputs make each output, and with which weights.
struct Filter {
    /// First input of each output.
    starts: Vec<usize>,
    /// `taps` weights for each output; zero beyond the last that counts.
    weights: Vec<i32>,
    taps: usize,
}

impl Filter {
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        // Enlarging interpolates between neighbours; shrinking widens the triangle, which is what antialiases.
        let support = scale.max(1.0);
        let taps = (2 * support.ceil() as usize + 1).min(from);
        let mut starts = Vec::with_capacity(to);
        let mut weights = vec![0; to * taps];
        let mut exact = Vec::with_capacity(taps);
        for (output, weights) in weights.chunks_exact_mut(taps).enumerate() {
            let center = (output as f64 + 0.5) * scale;
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            exact.clear();
            exact.extend((start..end).map(|input| {
                // Multiplied by the inverse and in this order, as Pillow does: another order rounds elsewhere.
                let distance = (input as f64 - center + 0.5) * (1.0 / support);
                (1.0 - distance.abs()).max(0.0)
            }));
            let sum: f64 = exact.iter().sum();
            // Close to the last input a triangle may reach beyond it; the window slides back, so that it stays inside.
            let shift = (start + taps).saturating_sub(from);
            for (weight, exact) in weights[shift..].iter_mut().zip(&exact) {
                *weight = (exact / sum * f64::from(1 << PRECISION_BITS) + 0.5) as i32;
            }
            starts.push(start - shift);
        }
        Self { starts, weights, taps }
    }

    /// First input and weights of each output.
    fn outputs(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.starts.iter().copied().zip(self.weights.chunks_exact(self.taps))
    }
}

fn resize_rows(pixels: &[u8], from: usize, to: usize) -> Vec<u8> {
    let filter = Filter::new(from, to);
    let mut out = vec![0; pixels.len() / from * to];
    for (row, out) in pixels.chunks_exact(from * 3).zip(out.chunks_exact_mut(to * 3)) {
        for ((start, weights), out) in filter.outputs().zip(out.chunks_exact_mut(3)) {
            let mut sums = [HALF; 3];
            for (pixel, weight) in row[start * 3..].chunks_exact(3).zip(weights) {
                for (sum, channel) in sums.iter_mut().zip(pixel) {
                    *sum += weight * i32::from(*channel);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = to_byte(sum);
            }
        }
    }
    out
}

fn resize_columns(pixels: &[u8], (height, width): (usize, usize), to: usize) -> Vec<u8> {
    let filter = Filter::new(height, to);
    let stride = width * 3;
    let mut out = vec![0; to * stride];
    let mut sums = vec![0; stride];
    for ((start, weights), out) in filter.outputs().zip(out.chunks_exact_mut(stride)) {
        sums.fill(HALF);
        for (row, weight) in pixels[start * stride..].chunks_exact(stride).zip(weights) {
            for (sum, channel) in sums.iter_mut().zip(row) {
                *sum += weight * i32::from(*channel);
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = to_byte(*sum);
        }
    }
    out
}

/// Rounded weights may add up to a little more than one.
fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).min(255) as u8
}
