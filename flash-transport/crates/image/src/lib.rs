//! What a robot does to a camera picture before it travels.
//!
//! The server's metadata says which size, axis order and encoding it wants of each camera ([`ImageSpec`]); [`prepare`]
//! makes it so. Resizing and conversion give the bytes that the model's own preprocessing would give, so that with a
//! lossless encoding the actions are the same bits whoever resizes.

#![forbid(unsafe_code)]

mod encode;
mod resize;

use std::borrow::Cow;
use std::iter;
use std::ops::Mul;
use std::panic::resume_unwind;
use std::str::FromStr;
use std::thread;

/// Most pixels of a picture, as the server has it (33 million, an 8K frame).
pub const MAX_PIXELS: u64 = 1 << 25;

/// Longest side of a JPEG, as libjpeg has it, which is what most read them with.
const MAX_JPEG_SIDE: u32 = 65_500;

/// How far float pixels may leave [0, 1]: interpolation overshoots a little, and less than a grey level is harmless.
const FLOAT_TOLERANCE: f64 = 1e-3;

/// Order of a picture's axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Height, width, channel.
    Hwc,
    /// Channel, height, width.
    Chw,
}

/// How a picture's bytes are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 8-bit RGB as it is.
    Raw,
    /// Lossless, about half the bytes of a photograph.
    Png,
    /// Lossy.
    Jpeg {
        /// 1 to 100.
        quality: u8,
        /// Resolution of colour.
        subsampling: Subsampling,
    },
}

/// JPEG chroma subsampling. Parses from `4:4:4`, `4:2:2` and `4:2:0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subsampling {
    /// `4:4:4`: colour at full resolution.
    S444,
    /// `4:2:2`: half the columns.
    S422,
    /// `4:2:0`: half the columns and half the rows.
    S420,
}

impl FromStr for Subsampling {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "4:4:4" => Ok(Self::S444),
            "4:2:2" => Ok(Self::S422),
            "4:2:0" => Ok(Self::S420),
            _ => Err(Error::Subsampling(text.chars().take(16).collect())),
        }
    }
}

/// What the server wants of one camera.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Rows of the model's picture.
    pub height: u32,
    /// Columns of the model's picture.
    pub width: u32,
    /// Axis order of a raw picture; coded pictures have none.
    pub layout: Layout,
    /// How it travels.
    pub encoding: Encoding,
}

/// Values of a picture in memory order.
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// 0 to 255.
    U8(&'a [u8]),
    /// In [0, 1]; becomes `255 * value`, truncated as openpi does.
    F32(&'a [f32]),
    /// As `F32`.
    F64(&'a [f64]),
}

impl Pixels<'_> {
    fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }
}

/// An RGB picture of a sensible size that somebody else owns.
#[derive(Clone, Copy, Debug)]
pub struct PictureRef<'a> {
    pixels: Pixels<'a>,
    height: u32,
    width: u32,
    layout: Layout,
}

impl<'a> PictureRef<'a> {
    /// `pixels` are contiguous and in the order that `layout` says.
    ///
    /// # Errors
    /// [`Error::Size`], or [`Error::Length`] where the number of values is not `height * width * 3`.
    pub fn new(pixels: Pixels<'a>, height: u32, width: u32, layout: Layout) -> Result<Self, Error> {
        let expected = num_values(height, width)?;
        if pixels.len() != expected {
            return Err(Error::Length { height, width, expected, got: pixels.len() });
        }
        Ok(Self { pixels, height, width, layout })
    }

    /// Whether there is nothing to scale, to transpose or to encode.
    fn travels_as_it_is(&self, spec: &ImageSpec) -> bool {
        (self.height, self.width, self.layout) == (spec.height, spec.width, spec.layout)
            && spec.encoding == Encoding::Raw
    }

    /// The picture as 8-bit RGB in its own axis order.
    fn bytes(&self) -> Result<Cow<'a, [u8]>, Error> {
        match self.pixels {
            Pixels::U8(values) => Ok(Cow::Borrowed(values)),
            Pixels::F32(values) => floats_to_bytes(values).map(Cow::Owned),
            Pixels::F64(values) => floats_to_bytes(values).map(Cow::Owned),
        }
    }
}

/// A picture as it travels: the fields of the wire's `Image`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Axis order of `data` where it is raw.
    pub layout: Layout,
    /// How `data` is coded.
    pub encoding: Encoding,
    /// The pixels.
    pub data: Vec<u8>,
}

/// Why a picture cannot be sent.
#[allow(missing_docs, reason = "each says it in its message")]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("expected both sides positive and at most {MAX_PIXELS} pixels, got {height}x{width}")]
    Size { height: u32, width: u32 },
    #[error("expected {expected} values for a {height}x{width} RGB picture, got {got}")]
    Length { height: u32, width: u32, expected: usize, got: usize },
    #[error("expected floats in [0, 1], got {0}")]
    Range(f64),
    #[error("a picture of {from_height}x{from_width} is too thin to be scaled to {height}x{width}")]
    TooThin { from_height: u32, from_width: u32, height: u32, width: u32 },
    #[error("expected a JPEG quality of 1 to 100, got {0}")]
    Quality(u8),
    #[error("expected a JPEG subsampling of 4:4:4, 4:2:2 or 4:2:0, got {0:?}")]
    Subsampling(String),
    #[error("expected sides of at most {MAX_JPEG_SIDE} pixels for JPEG, got {height}x{width}")]
    JpegSize { height: u32, width: u32 },
    #[error("encoding as JPEG: {0}")]
    Jpeg(#[from] libjpeg_turbo_rs::JpegError),
    #[error("encoding as PNG: {0}")]
    Png(#[from] png::EncodingError),
}

/// Converts, scales with black padding and encodes one picture as `spec` says.
///
/// # Errors
/// Float pixels outside [0, 1], a picture too thin to be scaled, or a `spec` that cannot be met.
pub fn prepare(picture: PictureRef<'_>, spec: &ImageSpec) -> Result<Encoded, Error> {
    num_values(spec.height, spec.width)?;
    let bytes = picture.bytes()?;
    let data = if picture.travels_as_it_is(spec) {
        bytes.into_owned()
    } else {
        let interleaved = match picture.layout {
            Layout::Hwc => bytes,
            Layout::Chw => Cow::Owned(interleave(&bytes)),
        };
        let (from, to) = ((picture.height, picture.width), (spec.height, spec.width));
        let scaled =
            if from == to { interleaved } else { Cow::Owned(resize::resize_with_pad(&interleaved, from, to)?) };
        encode::encode(scaled, spec)?
    };
    Ok(Encoded { height: spec.height, width: spec.width, layout: spec.layout, encoding: spec.encoding, data })
}

/// [`prepare`] for the cameras of one observation, in parallel. The results are in the same order.
pub fn prepare_all(pictures: &[(PictureRef<'_>, ImageSpec)]) -> Vec<Result<Encoded, Error>> {
    let one = |(picture, spec): &(PictureRef<'_>, ImageSpec)| prepare(*picture, spec);
    let Some((first, rest)) = pictures.split_first() else {
        return Vec::new();
    };
    // Starting a thread takes longer than copying a picture.
    if pictures.iter().all(|(picture, spec)| picture.travels_as_it_is(spec)) {
        return pictures.iter().map(one).collect();
    }
    thread::scope(|scope| {
        let others: Vec<_> = rest.iter().map(|camera| scope.spawn(move || one(camera))).collect();
        let first = one(first);
        let others = others.into_iter().map(|camera| camera.join().unwrap_or_else(|panic| resume_unwind(panic)));
        iter::once(first).chain(others).collect()
    })
}

/// Values of an RGB picture.
fn num_values(height: u32, width: u32) -> Result<usize, Error> {
    let pixels = u64::from(height) * u64::from(width);
    if pixels == 0 || pixels > MAX_PIXELS {
        return Err(Error::Size { height, width });
    }
    Ok(pixels as usize * 3)
}

fn floats_to_bytes<T: Copy + From<u8> + Into<f64> + Mul<Output = T>>(values: &[T]) -> Result<Vec<u8>, Error> {
    let sensible = -FLOAT_TOLERANCE..=1.0 + FLOAT_TOLERANCE;
    if let Some(value) = values.iter().map(|value| (*value).into()).find(|value| !sensible.contains(value)) {
        return Err(Error::Range(value));
    }
    // Multiplied at the picture's own precision, as numpy does: a wider product would truncate elsewhere.
    let scaled = values.iter().map(|value| (T::from(255) * *value).into());
    Ok(scaled.map(|value: f64| value as u8).collect())
}

/// (3, height, width) to (height, width, 3).
fn interleave(planes: &[u8]) -> Vec<u8> {
    let mut out = vec![0; planes.len()];
    let (red, rest) = planes.split_at(planes.len() / 3);
    let (green, blue) = rest.split_at(red.len());
    for (((out, red), green), blue) in out.chunks_exact_mut(3).zip(red).zip(green).zip(blue) {
        out.copy_from_slice(&[*red, *green, *blue]);
    }
    out
}
