//! Whatever is written is read again, in pieces of any size; whatever else arrives is refused and costs no memory.

use openpi_flash_wire::{Code, Decoder, Frame, Header, Hello, Method, Refusal, Request, Response, WireError, encode};
use proptest::prelude::*;

fn read<H: Header>(pieces: impl IntoIterator<Item = impl AsRef<[u8]>>, limit: usize) -> Result<Frame<H>, WireError> {
    let mut decoder = Decoder::new(limit);
    for piece in pieces {
        decoder.push(piece.as_ref())?;
    }
    decoder.finish()
}

fn requests() -> impl Strategy<Value = (Request, Vec<u8>)> {
    let method = prop::sample::select(vec![Method::Infer, Method::Reset, Method::GetMetadata]);
    let texts = ("\\PC{0,60}", "[ -~]{0,128}", "[ -~]{0,512}");
    (method, any::<u32>(), texts, prop::collection::vec(any::<u8>(), 0..3000)).prop_map(
        |(method, timeout_ms, (session, traceparent, tracestate), body)| {
            let body_length = body.len() as u32;
            (Request { method, timeout_ms, session, traceparent, tracestate, body_length }, body)
        },
    )
}

fn responses() -> impl Strategy<Value = (Response, Vec<u8>)> {
    let refusal = (1..=16_u32, "\\PC{0,300}", "\\PC{0,60}").prop_map(|(code, message, field)| Refusal {
        code: Code::from_number(code),
        message,
        field,
    });
    let body = prop::collection::vec(any::<u8>(), 0..3000);
    (any::<u32>(), prop::result::maybe_ok(body, refusal)).prop_map(|(server_us, result)| {
        let body = result.clone().unwrap_or_default();
        (Response { refusal: result.err(), server_us, body_length: body.len() as u32 }, body)
    })
}

fn pieces(bytes: &[u8], size: usize) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(size.max(1))
}

fn check<H: Header + PartialEq + std::fmt::Debug>(header: &H, body: &[u8], size: usize) -> Result<(), TestCaseError> {
    let mut bytes = encode(header).unwrap().to_vec();
    bytes.extend_from_slice(body);
    let frame = read::<H>(pieces(&bytes, size), 3000).unwrap();
    prop_assert_eq!(&frame.header, header);
    prop_assert_eq!(&frame.body[..], body);
    for end in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        prop_assert_eq!(read::<H>(pieces(&bytes[..end], size), 3000).unwrap_err(), WireError::Truncated);
    }
    bytes.push(0);
    prop_assert_eq!(read::<H>(pieces(&bytes, size), 3000).unwrap_err(), WireError::Trailing);
    Ok(())
}

proptest! {
    #[test]
    fn a_request_arrives_as_it_was_sent((header, body) in requests(), size in 1..400_usize) {
        check(&header, &body, size)?;
    }

    #[test]
    fn a_response_arrives_as_it_was_sent((header, body) in responses(), size in 1..400_usize) {
        check(&header, &body, size)?;
    }

    #[test]
    fn a_hello_arrives_as_it_was_sent(token in "\\PC{0,200}", size in 1..40_usize) {
        check(&Hello { token }, &[], size)?;
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), size in 1..40_usize) {
        let _ = read::<Request>(pieces(&bytes, size), 100);
        let _ = read::<Response>(pieces(&bytes, size), 100);
        let _ = read::<Hello>(pieces(&bytes, size), 100);
    }

    #[test]
    fn a_damaged_header_is_read_or_refused((header, body) in requests(), at in 0..16_usize, flip in 1..=255_u8) {
        let mut bytes = encode(&header).unwrap().to_vec();
        bytes.extend_from_slice(&body);
        bytes[at] ^= flip;
        if let Ok(frame) = read::<Request>([&bytes], 3000) {
            prop_assert_ne!(frame.header, header);
        }
    }
}

fn request(body_length: u32) -> Request {
    let (session, traceparent, tracestate) = Default::default();
    Request { method: Method::Infer, timeout_ms: 0, session, traceparent, tracestate, body_length }
}

#[test]
fn a_body_over_the_limit_is_refused_when_it_is_announced() {
    let header = encode(&request(1001)).unwrap();
    let refused = read::<Request>([&header], 1000).unwrap_err();
    assert_eq!(refused, WireError::TooLong { field: "body", length: 1001, limit: 1000 });
    let huge = encode(&request(u32::MAX)).unwrap();
    assert!(matches!(read::<Request>([&huge], usize::MAX), Err(WireError::TooLong { field: "body", .. })));
}

#[test]
fn each_part_of_a_header_has_its_limit() {
    for at in [13, 14] {
        let mut header = encode(&request(0)).unwrap().to_vec();
        header[at] = 0xff;
        assert!(matches!(read::<Request>([&header], 0), Err(WireError::TooLong { .. })));
    }
    assert!(matches!(encode(&Request { session: "x".repeat(256), ..request(0) }), Err(WireError::TooLong { .. })));
    let token = "x".repeat(4097);
    assert!(matches!(encode(&Hello { token }), Err(WireError::TooLong { .. })));
}

#[test]
fn what_this_version_does_not_know_is_refused() {
    let header = encode(&request(0)).unwrap();
    for (at, value, expected) in [
        (0, 2, WireError::Version(2)),
        (1, 9, WireError::Field { field: "method", problem: "unknown" }),
        (3, 1, WireError::Field { field: "flags", problem: "unknown" }),
    ] {
        let mut changed = header.to_vec();
        changed[at] = value;
        assert_eq!(read::<Request>([&changed], 0).unwrap_err(), expected);
    }
}

#[test]
fn a_trace_context_that_could_not_be_a_header_is_refused() {
    let header = encode(&Request { traceparent: "00-é".into(), ..request(0) }).unwrap();
    let expected = WireError::Field { field: "traceparent", problem: "not printable ASCII" };
    assert_eq!(read::<Request>([&header], 0).unwrap_err(), expected);
}

#[test]
fn a_refusal_that_is_too_long_is_cut_between_two_characters() {
    let refusal = Refusal { code: Code::Internal, message: "é".repeat(3000), field: "ü".repeat(600) };
    let sent = encode(&Response { refusal: Some(refusal), server_us: 0, body_length: 0 }).unwrap();
    let refusal = read::<Response>([&sent], 0).unwrap().header.refusal.unwrap();
    assert_eq!((refusal.message, refusal.field), ("é".repeat(2048), "ü".repeat(512)));
}

#[test]
fn a_token_is_not_shown() {
    assert!(!format!("{:?}", Hello { token: "secret".into() }).contains("secret"));
}
