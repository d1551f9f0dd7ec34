//! Interleaved RGB to the bytes that travel.

use std::borrow::Cow;

use libjpeg_turbo_rs::PixelFormat;

use crate::{Encoding, Error, ImageSpec, Layout, MAX_JPEG_SIDE, Subsampling};

/// Encodes `pixels`, interleaved RGB of the size in `spec`.
pub(crate) fn encode(pixels: Cow<'_, [u8]>, spec: &ImageSpec) -> Result<Vec<u8>, Error> {
    match (spec.encoding, spec.layout) {
        (Encoding::Raw, Layout::Hwc) => Ok(pixels.into_owned()),
        (Encoding::Raw, Layout::Chw) => Ok(deinterleave(&pixels)),
        (Encoding::Png, _) => encode_png(&pixels, spec.height, spec.width),
        (Encoding::Jpeg { quality, subsampling }, _) => {
            encode_jpeg(&pixels, spec.height, spec.width, quality, subsampling)
        }
    }
}

/// (height, width, 3) to (3, height, width).
fn deinterleave(pixels: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(pixels.len());
    for channel in 0..3 {
        out.extend(pixels.iter().skip(channel).step_by(3));
    }
    out
}

fn encode_png(pixels: &[u8], height: u32, width: u32) -> Result<Vec<u8>, Error> {
    // Photographs come out at about half: room for that saves growing.
    let mut data = Vec::with_capacity(pixels.len() / 2);
    let mut encoder = png::Encoder::new(&mut data, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // The slower settings save 3% of the bytes and take 40 times as long.
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(data)
}

fn encode_jpeg(
    pixels: &[u8],
    height: u32,
    width: u32,
    quality: u8,
    subsampling: Subsampling,
) -> Result<Vec<u8>, Error> {
    if !(1..=100).contains(&quality) {
        return Err(Error::Quality(quality));
    }
    if height.max(width) > MAX_JPEG_SIDE {
        return Err(Error::JpegSize { height, width });
    }
    let subsampling = match subsampling {
        Subsampling::S444 => libjpeg_turbo_rs::Subsampling::S444,
        Subsampling::S422 => libjpeg_turbo_rs::Subsampling::S422,
        Subsampling::S420 => libjpeg_turbo_rs::Subsampling::S420,
    };
    let (width, height) = (width as usize, height as usize);
    Ok(libjpeg_turbo_rs::compress(pixels, width, height, PixelFormat::Rgb, quality, subsampling)?)
}
