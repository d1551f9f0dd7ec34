//! Any sequence of datagrams: parsed, then taken in by a receiver and a sender, whose memory stays within its limits.
#![no_main]

use std::time::{Duration, Instant};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use openpi_flash_fec::{Answer, Datagram, Limits, Receiver, Redundancy, Sender};

const ROUND_TRIP: Duration = Duration::from_millis(20);

fuzz_target!(|datagrams: Vec<Vec<u8>>| {
    let limits = Limits { messages: 4, bytes: 1 << 20, ..Limits::default() };
    let mut receiver = Receiver::new(limits);
    let mut redundancy = Redundancy::default();
    let Ok(mut sender) = Sender::new(0, Bytes::from_static(&[7; 5000]), 300, &redundancy) else { return };
    let mut now = Instant::now();
    sender.flight_sent(now, ROUND_TRIP);
    for datagram in datagrams {
        now += Duration::from_millis(5);
        match Datagram::parse(&datagram) {
            Ok(Datagram::Symbol(symbol)) => drop(receiver.on_symbol(now, &symbol)),
            Ok(Datagram::Feedback(feedback)) => {
                if let Answer::Send(sent) = sender.on_feedback(now, ROUND_TRIP, &feedback, &mut redundancy) {
                    assert!(sent.len() < 100);
                }
            }
            Err(_) => {}
        }
        if receiver.poll_timeout().is_some_and(|at| at <= now) {
            for feedback in receiver.on_timeout(now, ROUND_TRIP) {
                assert!(matches!(Datagram::parse(&feedback), Ok(Datagram::Feedback(_))));
            }
        }
        assert!(receiver.held() <= limits.bytes * 3 / 2); // a byte besides for each symbol, which has two or more
    }
});
