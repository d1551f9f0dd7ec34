//! The envelopes of gRPC's streams: read or refused, no body longer than its message, and written again as read.

#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use openpi_flash_wire::envelope::{
    read_stream_request, read_stream_response, stream_refusal, stream_request_head, stream_response_head,
};

fuzz_target!(|data: &[u8]| {
    let message = Bytes::copy_from_slice(data);
    if let Ok(request) = read_stream_request(&message) {
        assert!(request.body.len() <= message.len());
        let again = [&stream_request_head(&request, "")[..], &request.body].concat();
        assert_eq!(read_stream_request(&again.into()).unwrap(), request);
    }
    if let Ok((id, result)) = read_stream_response(&message) {
        let again = match &result {
            Ok(body) => [&stream_response_head(id, body.len())[..], body].concat().into(),
            Err(refusal) => stream_refusal(id, refusal),
        };
        assert_eq!(read_stream_response(&again).unwrap(), (id, result));
    }
});
