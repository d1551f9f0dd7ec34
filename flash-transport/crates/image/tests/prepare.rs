//! What holds for every picture: axes, padding, encodings, and what is refused.

use openpi_flash_image::{
    Encoded, Encoding, Error, ImageSpec, Layout, MAX_PIXELS, PictureRef, Pixels, Subsampling, prepare, prepare_all,
};
use proptest::prelude::*;

const SUBSAMPLINGS: [Subsampling; 3] = [Subsampling::S444, Subsampling::S422, Subsampling::S420];

fn spec(height: u32, width: u32, layout: Layout, encoding: Encoding) -> ImageSpec {
    ImageSpec { height, width, layout, encoding }
}

fn hwc(pixels: &[u8], height: u32, width: u32) -> PictureRef<'_> {
    PictureRef::new(Pixels::U8(pixels), height, width, Layout::Hwc).unwrap()
}

/// A picture and the same with channels first.
fn transposed(pixels: &[u8]) -> Vec<u8> {
    (0..3).flat_map(|channel| pixels.iter().skip(channel).step_by(3)).copied().collect()
}

fn decode_png(data: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(data)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    (info.height, info.width, pixels)
}

fn decode_jpeg(data: &[u8]) -> (usize, usize, Vec<u8>) {
    let mut decoder = zune_jpeg::JpegDecoder::new(std::io::Cursor::new(data));
    let pixels = decoder.decode().unwrap();
    let (width, height) = decoder.dimensions().unwrap();
    (height, width, pixels)
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    10.0 * (255.0 * 255.0 * a.len() as f64 / squares).log10()
}

/// The photograph at 224x224: 300x451, so that there is padding.
fn photograph(encoding: Encoding) -> Encoded {
    let (height, width, pixels) = decode_png(include_bytes!("data/chelsea.png"));
    prepare(hwc(&pixels, height, width), &spec(224, 224, Layout::Hwc, encoding)).unwrap()
}

prop_compose! {
    /// A picture and a size to which it can be brought.
    fn any_picture()(height in 1u32..60, width in 1u32..60, to in (1u32..60, 1u32..60))
        (pixels in prop::collection::vec(any::<u8>(), (height * width * 3) as usize),
         height in Just(height), width in Just(width), to in Just(to)) -> (Vec<u8>, u32, u32, (u32, u32)) {
        (pixels, height, width, to)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn axes_make_no_difference((pixels, height, width, to) in any_picture()) {
        let planes = transposed(&pixels);
        let chw = PictureRef::new(Pixels::U8(&planes), height, width, Layout::Chw).unwrap();
        let as_hwc = spec(to.0, to.1, Layout::Hwc, Encoding::Raw);
        let as_chw = ImageSpec { layout: Layout::Chw, ..as_hwc };
        match prepare(hwc(&pixels, height, width), &as_hwc) {
            Ok(expected) => {
                prop_assert_eq!(expected.data.len() as u32, to.0 * to.1 * 3);
                prop_assert_eq!(&prepare(chw, &as_hwc).unwrap().data, &expected.data);
                let planes = transposed(&expected.data);
                prop_assert_eq!(&prepare(chw, &as_chw).unwrap().data, &planes);
                prop_assert_eq!(&prepare(hwc(&pixels, height, width), &as_chw).unwrap().data, &planes);
            }
            Err(error) => {
                prop_assert!(matches!(error, Error::TooThin { .. }), "{}", error);
                let ratio = (f64::from(width) / f64::from(to.1)).max(f64::from(height) / f64::from(to.0));
                prop_assert!(f64::from(height.min(width)) < ratio);
            }
        }
    }

    #[test]
    fn the_right_size_is_untouched((pixels, height, width, _) in any_picture()) {
        let out = prepare(hwc(&pixels, height, width), &spec(height, width, Layout::Hwc, Encoding::Raw)).unwrap();
        prop_assert_eq!(out.data, pixels);
    }

    #[test]
    fn png_is_lossless((pixels, height, width, _) in any_picture()) {
        let out = prepare(hwc(&pixels, height, width), &spec(height, width, Layout::Hwc, Encoding::Png)).unwrap();
        prop_assert_eq!(decode_png(&out.data), (height, width, pixels));
    }

    #[test]
    fn jpeg_of_any_size_decodes((pixels, height, width, _) in any_picture(), quality in 1u8..=100) {
        for subsampling in SUBSAMPLINGS {
            let encoding = Encoding::Jpeg { quality, subsampling };
            let out = prepare(hwc(&pixels, height, width), &spec(height, width, Layout::Hwc, encoding)).unwrap();
            let (rows, columns, _) = decode_jpeg(&out.data);
            prop_assert_eq!((rows, columns), (height as usize, width as usize));
        }
    }

    #[test]
    fn floats_of_either_width_are_truncated(pixels in prop::collection::vec(0.0f64..=1.0, 12)) {
        let expected: Vec<u8> = pixels.iter().map(|value| (255.0 * value).floor() as u8).collect();
        let out = |pixels| {
            let picture = PictureRef::new(pixels, 2, 2, Layout::Hwc).unwrap();
            prepare(picture, &spec(2, 2, Layout::Hwc, Encoding::Raw)).unwrap().data
        };
        prop_assert_eq!(out(Pixels::F64(&pixels)), expected);
        let narrow: Vec<f32> = pixels.iter().map(|value| *value as f32).collect();
        let expected: Vec<u8> = narrow.iter().map(|value| (255.0f32 * value).floor() as u8).collect();
        prop_assert_eq!(out(Pixels::F32(&narrow)), expected);
    }
}

#[test]
fn padding_is_black_and_the_odd_row_is_at_the_bottom() {
    let white = [255; 10 * 20 * 3];
    let out = prepare(hwc(&white, 10, 20), &spec(11, 10, Layout::Hwc, Encoding::Raw)).unwrap();
    let rows: Vec<&[u8]> = out.data.chunks_exact(30).collect();
    assert!(rows[3..8].iter().all(|row| row.iter().all(|byte| *byte == 255)));
    assert!(rows[..3].iter().chain(&rows[8..]).all(|row| row.iter().all(|byte| *byte == 0)));
}

#[test]
fn jpeg_keeps_a_photograph() {
    let raw = photograph(Encoding::Raw).data;
    // What was measured, less 0.3 dB: a coarser colour or a wrong table costs more.
    for (quality, expected) in [(80, [38.8, 38.2, 37.3]), (90, [41.4, 40.6, 39.3]), (95, [44.1, 43.1, 41.2])] {
        for (subsampling, expected) in SUBSAMPLINGS.into_iter().zip(expected) {
            let coded = photograph(Encoding::Jpeg { quality, subsampling });
            let (_, _, pixels) = decode_jpeg(&coded.data);
            let psnr = psnr(&raw, &pixels);
            assert!(psnr > expected, "{quality} {subsampling:?}: {psnr:.2} dB");
        }
    }
}

#[test]
fn jpeg_has_the_subsampling_that_was_asked_for() {
    for (subsampling, expected) in SUBSAMPLINGS.into_iter().zip([0x11, 0x21, 0x22]) {
        let data = photograph(Encoding::Jpeg { quality: 90, subsampling }).data;
        let frame = data.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
        // Marker, length, precision, height, width, number of components, identifier; then the first one's factors.
        assert_eq!(data[frame + 11], expected, "{subsampling:?}");
    }
}

#[test]
fn jpeg_blends_the_colours_that_it_merges() {
    let columns: Vec<u8> = [[255, 0, 0], [0, 0, 255]].concat().repeat(16 * 8);
    for subsampling in [Subsampling::S422, Subsampling::S420] {
        let encoding = Encoding::Jpeg { quality: 95, subsampling };
        let coded = prepare(hwc(&columns, 16, 16), &spec(16, 16, Layout::Hwc, encoding)).unwrap();
        let (_, _, pixels) = decode_jpeg(&coded.data);
        let mean = |channel| pixels.iter().skip(channel).step_by(3).map(|byte| f64::from(*byte)).sum::<f64>() / 256.0;
        assert!((mean(0) - mean(2)).abs() < 16.0, "{subsampling:?}: red {}, blue {}", mean(0), mean(2));
    }
}

#[test]
fn png_halves_a_photograph() {
    let coded = photograph(Encoding::Png).data;
    assert_eq!(decode_png(&coded).2, photograph(Encoding::Raw).data);
    assert!(coded.len() * 2 < 224 * 224 * 3, "{} bytes", coded.len());
}

#[test]
fn cameras_keep_their_order_and_their_errors() {
    let (small, large) = ([7; 2 * 2 * 3], [9; 4 * 4 * 3]);
    let raw = spec(4, 4, Layout::Hwc, Encoding::Raw);
    let bad = ImageSpec { encoding: Encoding::Jpeg { quality: 0, subsampling: Subsampling::S420 }, ..raw };
    let results = prepare_all(&[(hwc(&small, 2, 2), raw), (hwc(&large, 4, 4), bad), (hwc(&large, 4, 4), raw)]);
    let [first, second, third] = results.as_slice() else { panic!("{} results", results.len()) };
    assert_eq!(first.as_ref().unwrap().data, [7; 48]);
    assert!(matches!(second, Err(Error::Quality(0))));
    assert_eq!(third.as_ref().unwrap().data, [9; 48]);
    assert!(prepare_all(&[]).is_empty());
}

#[test]
fn what_is_no_picture_is_refused() {
    let message = |pixels, height, width| PictureRef::new(pixels, height, width, Layout::Hwc).unwrap_err().to_string();
    assert_eq!(message(Pixels::U8(&[0; 12]), 2, 3), "expected 18 values for a 2x3 RGB picture, got 12");
    let size = "expected both sides positive and at most 33554432 pixels, got";
    assert_eq!(message(Pixels::U8(&[]), 0, 3), format!("{size} 0x3"));
    assert_eq!(message(Pixels::U8(&[]), u32::MAX, u32::MAX), format!("{size} 4294967295x4294967295"));
}

#[test]
fn floats_out_of_range_are_refused() {
    for value in [200.0, -1.0, 1.01, f64::NAN, f64::INFINITY] {
        let pixels = [0.5, value, 0.5];
        let picture = PictureRef::new(Pixels::F64(&pixels), 1, 1, Layout::Hwc).unwrap();
        let error = prepare(picture, &spec(1, 1, Layout::Hwc, Encoding::Raw)).unwrap_err();
        assert_eq!(error.to_string(), format!("expected floats in [0, 1], got {value}"));
    }
    let overshoot = PictureRef::new(Pixels::F64(&[-0.0009, 0.5, 1.0009]), 1, 1, Layout::Hwc).unwrap();
    assert_eq!(prepare(overshoot, &spec(1, 1, Layout::Hwc, Encoding::Raw)).unwrap().data, [0, 127, 255]);
}

#[test]
fn a_spec_that_cannot_be_met_is_refused() {
    let pixels = [0; 500 * 3];
    let message = |spec| prepare(hwc(&pixels, 1, 500), &spec).unwrap_err().to_string();
    let too_thin = "a picture of 1x500 is too thin to be scaled to 32x32";
    assert_eq!(message(spec(32, 32, Layout::Hwc, Encoding::Raw)), too_thin);
    for (height, width) in [(0, 8), (8, 0), (MAX_PIXELS as u32 + 1, 1), (u32::MAX, u32::MAX)] {
        assert!(message(spec(height, width, Layout::Hwc, Encoding::Png)).ends_with(&format!("got {height}x{width}")));
    }
    let jpeg = |quality| Encoding::Jpeg { quality, subsampling: Subsampling::S444 };
    let quality = "expected a JPEG quality of 1 to 100, got 101";
    assert_eq!(message(spec(1, 500, Layout::Hwc, jpeg(101))), quality);
    let wide = "expected sides of at most 65500 pixels for JPEG, got 200x65501";
    assert_eq!(message(spec(200, 65501, Layout::Hwc, jpeg(90))), wide);
    let parsed: Result<Subsampling, _> = "4:1:1".parse();
    assert_eq!(parsed.unwrap_err().to_string(), "expected a JPEG subsampling of 4:4:4, 4:2:2 or 4:2:0, got \"4:1:1\"");
    for (text, expected) in ["4:4:4", "4:2:2", "4:2:0"].into_iter().zip(SUBSAMPLINGS) {
        assert_eq!(text.parse::<Subsampling>().unwrap(), expected);
    }
}
