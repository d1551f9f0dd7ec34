//! Pictures from numpy to the serialized fields of an `InferRequest`.

use openpi_flash_image::{Encoding, ImageSpec, Layout, PictureRef, Pixels, prepare_all};
use openpi_flash_wire::protobuf::{put_length, put_number, put_text};
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyException, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::invalid;

pyo3::create_exception!(
    openpi_flash_transport,
    PictureError,
    PyException,
    "A picture that cannot be prepared: its name, and why."
);

// Field numbers of proto/openpi_flash/v1.
const REQUEST_OBSERVATION: u32 = 6;
const OBSERVATION_IMAGES: u32 = 2;
const ENTRY_KEY: u32 = 1;
const ENTRY_VALUE: u32 = 2;
const IMAGE_ENCODING: u32 = 1;
const IMAGE_HEIGHT: u32 = 2;
const IMAGE_WIDTH: u32 = 3;
const IMAGE_LAYOUT: u32 = 4;
const IMAGE_DATA: u32 = 5;

/// Room for tags, lengths, sizes and a camera's name.
const HEAD_BYTES: usize = 128;

/// A link that carries fewer bytes per second gets PNG where the choice is ours. It saves a third to a half of a
/// photograph's bytes, which on such a link take longer than encoding at the robot and decoding at the server: of three
/// pictures of 224x224 it saves 150 to 250 KB, 6 to 10 ms at this rate, for 2 + 4 ms on two cores of a server.
const SLOW_LINK: f64 = 25e6;

/// What the server wants of one camera.
#[pyclass(frozen, skip_from_py_object, module = "openpi_flash_transport")]
pub struct Camera {
    height: u32,
    width: u32,
    /// None: whichever of the lossless ones is faster.
    encoding: Option<Encoding>,
}

#[pymethods]
impl Camera {
    #[new]
    #[pyo3(signature = (height, width, encoding, quality = 0, subsampling = ""))]
    fn new(height: u32, width: u32, encoding: &str, quality: u8, subsampling: &str) -> PyResult<Self> {
        let encoding = match encoding {
            "lossless" => None,
            "raw" => Some(Encoding::Raw),
            "png" => Some(Encoding::Png),
            "jpeg" => {
                let subsampling = subsampling.parse().map_err(|error: openpi_flash_image::Error| invalid(&error))?;
                Some(Encoding::Jpeg { quality, subsampling })
            }
            _ => {
                let problem = format!("encoding: {encoding:?} is not one of lossless, raw, png and jpeg");
                return Err(PyValueError::new_err(problem));
            }
        };
        Ok(Self { height, width, encoding })
    }
}

/// Name, C-contiguous array, whether its axes are (channel, height, width), and what it becomes.
pub type Picture<'py> = (String, Bound<'py, PyAny>, bool, Py<Camera>);

/// Serialized `InferRequest` fields that hold the pictures, each as its camera wants it.
#[pyfunction]
pub fn prepare<'py>(py: Python<'py>, pictures: Vec<Picture<'py>>) -> PyResult<Bound<'py, PyBytes>> {
    let message = Message::gather(py, b"", pictures, None)?;
    let message = py.detach(|| message.finish()).map_err(PyErr::from)?;
    Ok(PyBytes::new(py, &message))
}

/// A serialized `InferRequest` that grows, and pictures that still have to be prepared. The pixels are copied while
/// the interpreter's lock is held: without it, somebody could change them meanwhile.
pub struct Message {
    bytes: Vec<u8>,
    waiting: Vec<Waiting>,
}

struct Waiting {
    name: String,
    pixels: Owned,
    size: (u32, u32),
    layout: Layout,
    spec: ImageSpec,
}

enum Owned {
    U8(Vec<u8>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Message {
    /// Begins with the fields in `head`. A picture that travels as it is is copied once, to its place. `rate` is what the
    /// link carries, in bytes per second, where that is known.
    pub fn gather<'py>(py: Python<'py>, head: &[u8], pictures: Vec<Picture<'py>>, rate: Option<f64>) -> PyResult<Self> {
        let lossless = if rate.is_some_and(|rate| rate < SLOW_LINK) { Encoding::Png } else { Encoding::Raw };
        let pixels: usize = pictures.iter().map(|(_, _, _, camera)| num_bytes(camera.get())).sum();
        let mut bytes = Vec::with_capacity(head.len() + pixels + HEAD_BYTES * pictures.len());
        bytes.extend_from_slice(head);
        let mut message = Self { bytes, waiting: Vec::new() };
        for (name, array, channels_first, camera) in pictures {
            let camera = camera.get();
            let encoding = camera.encoding.unwrap_or(lossless);
            message.add(py, name, &array, channels_first, (camera.height, camera.width), encoding)?;
        }
        Ok(message)
    }

    fn add<'py>(
        &mut self,
        py: Python<'py>,
        name: String,
        array: &Bound<'py, PyAny>,
        channels_first: bool,
        wanted: (u32, u32),
        encoding: Encoding,
    ) -> PyResult<()> {
        let layout = if channels_first { Layout::Chw } else { Layout::Hwc };
        let (pixels, size) = if let Ok(buffer) = PyBuffer::<u8>::get(array) {
            let size = size(&buffer, layout)?;
            if size == wanted && encoding == Encoding::Raw {
                let pixels = buffer.as_slice(py).ok_or_else(not_contiguous)?;
                self.put_head(&name, Encoding::Raw, size, layout, pixels.len());
                self.bytes.extend(pixels.iter().map(pyo3::buffer::ReadOnlyCell::get));
                return Ok(());
            }
            (Owned::U8(buffer.to_vec(py)?), size)
        } else if let Ok(buffer) = PyBuffer::<f32>::get(array) {
            (Owned::F32(buffer.to_vec(py)?), size(&buffer, layout)?)
        } else {
            let buffer = PyBuffer::<f64>::get(array)?;
            (Owned::F64(buffer.to_vec(py)?), size(&buffer, layout)?)
        };
        // A raw picture says in which order its axes are, and the server takes either: so nothing is transposed for it.
        let layout_sent = if size == wanted { layout } else { Layout::Hwc };
        let spec = ImageSpec { height: wanted.0, width: wanted.1, layout: layout_sent, encoding };
        self.waiting.push(Waiting { name, pixels, size, layout, spec });
        Ok(())
    }

    /// Whether there is nothing left to prepare.
    pub fn is_ready(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The whole message, once every picture is prepared, several at a time.
    pub fn finish(mut self) -> Result<Vec<u8>, Unprepared> {
        let waiting = std::mem::take(&mut self.waiting);
        let mut pictures = Vec::with_capacity(waiting.len());
        for Waiting { name, pixels, size: (height, width), layout, spec } in &waiting {
            let pixels = match pixels {
                Owned::U8(values) => Pixels::U8(values),
                Owned::F32(values) => Pixels::F32(values),
                Owned::F64(values) => Pixels::F64(values),
            };
            let picture = PictureRef::new(pixels, *height, *width, *layout);
            pictures.push((picture.map_err(|error| Unprepared::new(name, &error))?, *spec));
        }
        for (Waiting { name, .. }, encoded) in waiting.iter().zip(prepare_all(&pictures)) {
            let picture = encoded.map_err(|error| Unprepared::new(name, &error))?;
            let size = (picture.height, picture.width);
            self.put_head(name, picture.encoding, size, picture.layout, picture.data.len());
            self.bytes.extend_from_slice(&picture.data);
        }
        Ok(self.bytes)
    }

    /// All of a picture but its `length` bytes of data, which come last.
    fn put_head(&mut self, name: &str, encoding: Encoding, size: (u32, u32), layout: Layout, length: usize) {
        let mut image = Vec::with_capacity(HEAD_BYTES);
        put_number(
            &mut image,
            IMAGE_ENCODING,
            match encoding {
                Encoding::Raw => 1,
                Encoding::Jpeg { .. } => 2,
                Encoding::Png => 3,
            },
        );
        put_number(&mut image, IMAGE_HEIGHT, u64::from(size.0));
        put_number(&mut image, IMAGE_WIDTH, u64::from(size.1));
        put_number(&mut image, IMAGE_LAYOUT, if layout == Layout::Hwc { 1 } else { 2 });
        put_length(&mut image, IMAGE_DATA, length);
        let mut entry = Vec::with_capacity(HEAD_BYTES + name.len());
        put_text(&mut entry, ENTRY_KEY, name);
        put_length(&mut entry, ENTRY_VALUE, image.len() + length);
        entry.extend_from_slice(&image);
        let mut images = Vec::with_capacity(HEAD_BYTES + entry.len());
        put_length(&mut images, OBSERVATION_IMAGES, entry.len() + length);
        images.extend_from_slice(&entry);
        put_length(&mut self.bytes, REQUEST_OBSERVATION, images.len() + length);
        self.bytes.extend_from_slice(&images);
    }
}

/// A picture that cannot be prepared.
pub struct Unprepared {
    name: String,
    reason: String,
}

impl Unprepared {
    fn new(name: &str, error: &openpi_flash_image::Error) -> Self {
        Self { name: name.to_owned(), reason: error.to_string() }
    }
}

impl From<Unprepared> for PyErr {
    fn from(error: Unprepared) -> Self {
        PictureError::new_err((error.name, error.reason))
    }
}

/// Height and width.
fn size<T: Element>(buffer: &PyBuffer<T>, layout: Layout) -> PyResult<(u32, u32)> {
    let size = match (buffer.shape(), layout) {
        (&[height, width, 3], Layout::Hwc) | (&[3, height, width], Layout::Chw) => (height, width),
        (shape, _) => return Err(PyTypeError::new_err(format!("{shape:?} is not the shape of a picture"))),
    };
    let side = |length: usize| u32::try_from(length).map_err(|_| PyTypeError::new_err("a picture of such a size"));
    Ok((side(size.0)?, side(size.1)?))
}

fn num_bytes(camera: &Camera) -> usize {
    (camera.height as usize).saturating_mul(camera.width as usize).saturating_mul(3).min(64 << 20)
}

fn not_contiguous() -> PyErr {
    PyTypeError::new_err("a C-contiguous array is expected")
}
