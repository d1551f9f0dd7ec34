//! The envelopes agree with protobuf's own encoding of the messages they stand for.

use bytes::Bytes;
use openpi_flash_wire::envelope::{
    StreamRequest, read_stream_request, read_stream_response, reset_request, session_prefix, stream_refusal,
    stream_request_head, stream_response_head,
};
use openpi_flash_wire::{Code, Refusal, WireError};
use proptest::prelude::*;

fn join(head: &Bytes, body: &[u8]) -> Bytes {
    [head, body].concat().into()
}

#[test]
fn a_stream_request_has_the_bytes_that_protobuf_gives_it() {
    let request = StreamRequest {
        request_id: 300,
        timeout_ms: 5,
        traceparent: "p".into(),
        tracestate: "s".into(),
        body: Bytes::from_static(b"\x20\x01"),
    };
    let bytes = join(&stream_request_head(&request, ""), &request.body);
    assert_eq!(&bytes[..], b"\x08\xac\x02\x10\x05\x1a\x01p\x22\x01s\x2a\x02\x20\x01");
    let with_session = join(&stream_request_head(&request, "me"), &request.body);
    assert_eq!(&with_session[..], b"\x08\xac\x02\x10\x05\x1a\x01p\x22\x01s\x2a\x06\x0a\x02me\x20\x01");
}

#[test]
fn stream_responses_have_the_bytes_that_protobuf_gives_them() {
    assert_eq!(&stream_response_head(7, 130)[..], b"\x08\x07\x12\x82\x01");
    let refusal = Refusal { code: Code::InvalidArgument, message: "m".into(), field: "f".into() };
    assert_eq!(&stream_refusal(7, &refusal)[..], b"\x08\x07\x1a\x08\x08\x03\x12\x01m\x1a\x01f");
    assert_eq!(&reset_request("me")[..], b"\x0a\x02me");
    assert!(session_prefix("").is_empty());
}

#[test]
fn a_response_without_one_result_is_refused() {
    for bytes in [&b"\x08\x07"[..], b"\x12\x00\x12\x00", b"\x12\x00\x1a\x00"] {
        assert!(matches!(read_stream_response(&Bytes::from_static(bytes)), Err(WireError::Protobuf(_))));
    }
}

#[test]
fn pieces_of_an_inference_are_joined() {
    let request = read_stream_request(&Bytes::from_static(b"\x2a\x01a\x08\x01\x2a\x01b")).unwrap();
    assert_eq!((request.request_id, &request.body[..]), (1, &b"ab"[..]));
}

#[test]
fn what_is_no_message_is_refused() {
    for bytes in
        [&b"\x2a\x05ab"[..], b"\x08", b"\x00\x01", b"\x0b", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
    {
        assert!(matches!(read_stream_request(&Bytes::from_static(bytes)), Err(WireError::Protobuf(_))), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn a_stream_request_is_read_as_it_was_written(
        (request_id, timeout_ms) in any::<(u64, u32)>(),
        (traceparent, tracestate) in ("[ -~]{0,60}", "\\PC{0,60}"),
        body in prop::collection::vec(any::<u8>(), 0..500),
    ) {
        let request = StreamRequest { request_id, timeout_ms, traceparent, tracestate, body: body.into() };
        let bytes = join(&stream_request_head(&request, ""), &request.body);
        prop_assert_eq!(read_stream_request(&bytes).unwrap(), request);
    }

    #[test]
    fn a_stream_response_is_read_as_it_was_written(id in any::<u64>(), body in prop::collection::vec(any::<u8>(), 0..500)) {
        let bytes = join(&stream_response_head(id, body.len()), &body);
        prop_assert_eq!(read_stream_response(&bytes).unwrap(), (id, Ok(Bytes::from(body))));
    }

    #[test]
    fn a_refusal_is_read_as_it_was_written(id in any::<u64>(), code in 1..=16_u32, message in "\\PC{0,60}", field in "\\PC{0,60}") {
        let refusal = Refusal { code: Code::from_number(code), message, field };
        prop_assert_eq!(read_stream_response(&stream_refusal(id, &refusal)).unwrap(), (id, Err(refusal)));
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let bytes = Bytes::from(bytes);
        let _ = read_stream_request(&bytes);
        let _ = read_stream_response(&bytes);
    }
}
