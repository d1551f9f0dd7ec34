//! Prepares one picture as a robot would and says on stderr how long that took.
//!
//! `prepare HEIGHT WIDTH SIZE raw|png|QUALITY SUBSAMPLING` reads HEIGHT x WIDTH 8-bit RGB pixels from stdin and writes the
//! coded SIZE x SIZE picture to stdout.

use std::env;
use std::error::Error;
use std::io::{self, Read, Write};
use std::time::Instant;

use openpi_flash_image::{Encoding, ImageSpec, Layout, PictureRef, Pixels, prepare};

const REPEATS: usize = 50;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [height, width, size, encoding, rest @ ..] = args.as_slice() else {
        return Err("expected HEIGHT WIDTH SIZE ENCODING".into());
    };
    let (height, width, size) = (height.parse()?, width.parse()?, size.parse()?);
    let encoding = match (encoding.as_str(), rest) {
        ("raw", []) => Encoding::Raw,
        ("png", []) => Encoding::Png,
        (quality, [subsampling]) => Encoding::Jpeg { quality: quality.parse()?, subsampling: subsampling.parse()? },
        _ => return Err("expected raw, png, or a JPEG quality and subsampling".into()),
    };
    let mut pixels = Vec::new();
    io::stdin().read_to_end(&mut pixels)?;
    let picture = PictureRef::new(Pixels::U8(&pixels), height, width, Layout::Hwc)?;
    let spec = ImageSpec { height: size, width: size, layout: Layout::Hwc, encoding };

    let coded = prepare(picture, &spec)?;
    let mut times_ms = Vec::with_capacity(REPEATS);
    for _ in 0..REPEATS {
        let start = Instant::now();
        prepare(picture, &spec)?;
        times_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times_ms.sort_by(f64::total_cmp);
    eprintln!("{:.3}", times_ms[REPEATS / 2]);
    io::stdout().write_all(&coded.data)?;
    Ok(())
}
