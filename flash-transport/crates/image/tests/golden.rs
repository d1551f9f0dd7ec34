//! The same bytes as openpi and Pillow. How the numbers were made: `tests/data/README.md` here and in the repository.

use std::fs::File;
use std::path::Path;

use npyz::npz::NpzArchive;
use openpi_flash_image::{Encoding, ImageSpec, Layout, PictureRef, Pixels, prepare};

fn raw(height: u32, width: u32) -> ImageSpec {
    ImageSpec { height, width, layout: Layout::Hwc, encoding: Encoding::Raw }
}

fn resized(pixels: &[u8], (height, width): (u32, u32), to: (u32, u32)) -> Vec<u8> {
    let picture = PictureRef::new(Pixels::U8(pixels), height, width, Layout::Hwc).unwrap();
    prepare(picture, &raw(to.0, to.1)).unwrap().data
}

/// The bytes of byte `index` of the picture of line `seed`, as the README's script makes them.
fn hashed_pixels(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|index| {
            let x = index.wrapping_add(seed.wrapping_mul(0x9E37_79B9));
            let x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
            let x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
            (x >> 24) as u8
        })
        .collect()
}

fn chelsea() -> Vec<u8> {
    let file = std::io::BufReader::new(File::open("tests/data/chelsea.png").unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}

#[test]
fn resizing_equals_pillow_at_every_size() {
    let table = std::fs::read_to_string("tests/data/pillow.csv").unwrap();
    let photograph = chelsea();
    let mut photographs = 0;
    for (line, seed) in table.lines().zip(0..) {
        let fields: Vec<u32> = line.split(',').map(|field| field.parse().unwrap()).collect();
        let &[height, width, to_height, to_width, crc] = fields.as_slice() else { panic!("{line}") };
        let hashed;
        let pixels = if seed < 1500 {
            hashed = hashed_pixels(seed, (height * width * 3) as usize);
            &hashed
        } else {
            photographs += 1;
            &photograph
        };
        let out = resized(pixels, (height, width), (to_height, to_width));
        assert_eq!(crc32fast::hash(&out), crc, "line {seed}: {height}x{width} to {to_height}x{to_width}");
    }
    assert_eq!(photographs, 3);
}

struct Golden(NpzArchive<std::io::BufReader<File>>);

impl Golden {
    fn open() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
        Self(NpzArchive::open(root.join("tests/data/golden/transforms/resize_pil.npz")).unwrap())
    }

    /// Elements, and (height, width) of each picture in them.
    fn array<T: npyz::Deserialize>(&mut self, name: &str) -> (Vec<T>, (u32, u32)) {
        let array = self.0.by_name(name).unwrap().unwrap_or_else(|| panic!("{name} is missing"));
        let &[.., height, width, 3] = array.shape() else { panic!("{name}: {:?}", array.shape()) };
        (array.into_vec().unwrap(), (height as u32, width as u32))
    }
}

#[test]
fn resizing_equals_openpi() {
    let mut golden = Golden::open();
    let names: Vec<_> =
        (0..9).map(|case| format!("pil_{case}")).chain(["pil_noise".into(), "pil_batch".into()]).collect();
    for name in names {
        let (pictures, from) = golden.array::<u8>(&format!("{name}_in"));
        let (expected, to) = golden.array::<u8>(&format!("{name}_out"));
        let size = |(height, width): (u32, u32)| (height * width * 3) as usize;
        assert_eq!(pictures.len() / size(from), expected.len() / size(to));
        for (picture, expected) in pictures.chunks_exact(size(from)).zip(expected.chunks_exact(size(to))) {
            assert!(resized(picture, from, to) == expected, "{name}");
        }
    }
}

#[test]
fn float_pictures_become_openpis_bytes() {
    let mut golden = Golden::open();
    let (values, (height, width)) = golden.array::<f32>("to_uint8_in");
    let (expected, _) = golden.array::<u8>("to_uint8_out");
    let picture = PictureRef::new(Pixels::F32(&values), height, width, Layout::Hwc).unwrap();
    assert_eq!(prepare(picture, &raw(height, width)).unwrap().data, expected);
}
