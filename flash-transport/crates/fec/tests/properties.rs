//! What must hold whatever the network and the peer do.

use std::time::{Duration, Instant};

use bytes::Bytes;
use openpi_flash_fec::{Answer, Datagram, Event, Feedback, Limits, Receiver, Redundancy, Sender, Symbol, Verdict};
use proptest::collection::vec;
use proptest::prelude::*;

const ROUND_TRIP: Duration = Duration::from_millis(20);

fn message(length: usize) -> Bytes {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// Everything that a sender sends unasked.
fn datagrams(sender: &mut Sender) -> Vec<Bytes> {
    std::iter::from_fn(|| sender.next_datagram()).collect()
}

fn symbol(datagram: &Bytes) -> Symbol<'_> {
    match Datagram::parse(datagram) {
        Ok(Datagram::Symbol(symbol)) => symbol,
        other => panic!("not a symbol: {other:?}"),
    }
}

fn feedback(datagram: &[u8]) -> Feedback {
    match Datagram::parse(datagram) {
        Ok(Datagram::Feedback(feedback)) => feedback,
        other => panic!("not feedback: {other:?}"),
    }
}

/// A redundancy that has seen `percent` of losses for long.
fn seasoned(percent: usize) -> Redundancy {
    let mut redundancy = Redundancy::default();
    for _ in 0..50 {
        redundancy.on_report(1000, 10 * percent, 1);
    }
    redundancy
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// As many symbols as there are sources, in any order and twice over, are the message.
    #[test]
    fn any_k_symbols_suffice(length in 1usize..120_000, datagram in 40usize..1500, percent in 0usize..20, keys in vec(any::<u32>(), 400)) {
        prop_assume!(length / (datagram - 14) < 600);
        let sent = message(length);
        let mut sender = Sender::new(7, sent.clone(), datagram, &seasoned(percent)).unwrap();
        let mut flight = datagrams(&mut sender);
        prop_assert!(flight.iter().all(|bytes| bytes.len() <= datagram));
        let sources = length.div_ceil(flight[0].len() - 14);
        let mut keyed: Vec<_> = flight.drain(..).zip(keys.iter().cycle()).collect();
        keyed.sort_by_key(|(_, key)| **key);
        let mut receiver = Receiver::new(Limits::default());
        let now = Instant::now();
        for (arrived, (bytes, _)) in keyed.iter().enumerate() {
            let event = receiver.on_symbol(now, &symbol(bytes)).unwrap();
            if arrived + 1 == sources {
                let Some(Event::Complete { message: 7, body, feedback: done }) = event else {
                    return Err(TestCaseError::fail(format!("{event:?}")));
                };
                prop_assert_eq!(body, sent.clone());
                prop_assert_eq!(feedback(&done).verdict, Verdict::Done);
            } else if arrived < sources {
                prop_assert_eq!(event, None);
            }
            let again = receiver.on_symbol(now, &symbol(bytes)).unwrap();
            prop_assert!(matches!(again, None | Some(Event::Feedback(_))));
        }
        prop_assert_eq!(receiver.poll_timeout(), None);
    }

    /// Whatever gets lost of the flight but one symbol, what the receiver asks for completes the message.
    #[test]
    fn needs_complete_any_message(length in 3000usize..1_500_000, lost in 0usize..100, seed in any::<u64>()) {
        let sent = message(length);
        let mut rng = openpi_flash_linksim::rng(seed);
        let mut redundancy = Redundancy::default();
        let mut sender = Sender::new(1, sent.clone(), 1400, &redundancy).unwrap();
        let mut receiver = Receiver::new(Limits::default());
        let mut now = Instant::now();
        let mut flight = datagrams(&mut sender);
        sender.flight_sent(now, ROUND_TRIP);
        let first = flight[0].clone();
        flight.retain(|bytes| *bytes == first || rng.usize(..100) >= lost);
        let mut body = None;
        for _ in 0..10 {
            for bytes in flight.drain(..) {
                if let Some(Event::Complete { body: complete, .. }) = receiver.on_symbol(now, &symbol(&bytes)).unwrap() {
                    body = Some(complete);
                }
            }
            let Some(at) = receiver.poll_timeout() else { break };
            now = at;
            let asked = receiver.on_timeout(now, ROUND_TRIP);
            now += ROUND_TRIP;
            for need in asked {
                match sender.on_feedback(now, ROUND_TRIP, &feedback(&need), &mut redundancy) {
                    Answer::Send(datagrams) => flight.extend(datagrams),
                    other => return Err(TestCaseError::fail(format!("{other:?}"))),
                }
            }
        }
        prop_assert_eq!(body, Some(sent));
    }

    /// Garbage, and damaged symbols among good ones, are refused or ignored; memory stays within the limits.
    #[test]
    fn garbage_is_refused(noise in vec(vec(any::<u8>(), 0..200), 1..60), flips in vec((any::<prop::sample::Index>(), 0usize..14, any::<u8>()), 0..40)) {
        let sent = message(50_000);
        let mut sender = Sender::new(3, sent, 1400, &Redundancy::default()).unwrap();
        let flight = datagrams(&mut sender);
        let damaged = flips.iter().map(|(which, at, with)| {
            let mut bytes = which.get(&flight).to_vec();
            bytes[*at] ^= with;
            bytes
        });
        let limits = Limits { messages: 4, bytes: 1 << 20, ..Limits::default() };
        let mut receiver = Receiver::new(limits);
        let mut redundancy = Redundancy::default();
        let now = Instant::now();
        sender.flight_sent(now, ROUND_TRIP);
        for bytes in noise.into_iter().chain(damaged) {
            let kinds = [None, Some(0x11), Some(0x12), Some(0x13), Some(0x14)];
            for kind in kinds {
                let mut bytes = bytes.clone();
                if let (Some(first), Some(kind)) = (bytes.first_mut(), kind) {
                    *first = kind;
                }
                match Datagram::parse(&bytes) {
                    Ok(Datagram::Symbol(symbol)) => drop(receiver.on_symbol(now, &symbol)),
                    Ok(Datagram::Feedback(feedback)) => {
                        let later = now + Duration::from_secs(1);
                        if let Answer::Send(datagrams) = sender.on_feedback(later, ROUND_TRIP, &feedback, &mut redundancy) {
                            prop_assert!(datagrams.len() <= 2 * flight.len() + 2);
                        }
                    }
                    Err(_) => {}
                }
                prop_assert!(receiver.held() <= 3 << 19); // a byte besides for each symbol, which has two or more
            }
        }
    }
}

#[test]
fn contradictions_are_refused_and_the_message_survives() {
    let sent = message(10_000);
    let flight = datagrams(&mut Sender::new(5, sent.clone(), 1400, &Redundancy::default()).unwrap());
    let other = datagrams(&mut Sender::new(5, message(9_000), 1400, &Redundancy::default()).unwrap());
    let mut receiver = Receiver::new(Limits::default());
    let now = Instant::now();
    assert_eq!(receiver.on_symbol(now, &symbol(&flight[0])), Ok(None));
    assert!(receiver.on_symbol(now, &symbol(&other[0])).is_err());
    let complete = flight[1..].iter().find_map(|bytes| receiver.on_symbol(now, &symbol(bytes)).unwrap());
    assert!(matches!(complete, Some(Event::Complete { body, .. }) if body == sent));
}

#[test]
fn beyond_the_limits_a_message_is_left_to_the_stream_once() {
    let limits = Limits { messages: 1, message_length: 20_000, ..Limits::default() };
    let mut receiver = Receiver::new(limits);
    let now = Instant::now();
    let mut offer = |id, length| {
        let mut sender = Sender::new(id, message(length), 1400, &Redundancy::default()).unwrap();
        let flight = datagrams(&mut sender);
        let events = flight[..2].iter().map(|bytes| receiver.on_symbol(now, &symbol(bytes)).unwrap());
        (sender, events.collect::<Vec<_>>())
    };
    assert_eq!(offer(1, 10_000).1, [None, None]);
    for (id, length) in [(2, 10_000), (3, 30_000)] {
        let (mut sender, events) = offer(id, length);
        let [Some(Event::Feedback(refusal)), None] = &events[..] else { panic!("{events:?}") };
        let answer = sender.on_feedback(now, ROUND_TRIP, &feedback(refusal), &mut Redundancy::default());
        assert_eq!(answer, Answer::UseStream);
    }
}

#[test]
fn a_silent_sender_is_asked_and_then_given_up() {
    let mut sender = Sender::new(5, message(100_000), 1400, &Redundancy::default()).unwrap();
    let first = sender.next_datagram().unwrap();
    let mut receiver = Receiver::new(Limits::default());
    let start = Instant::now();
    receiver.on_symbol(start, &symbol(&first)).unwrap();
    let mut verdicts = Vec::new();
    let mut last = start;
    while let Some(at) = receiver.poll_timeout() {
        assert!(receiver.on_timeout(at.checked_sub(Duration::from_micros(1)).unwrap(), ROUND_TRIP).is_empty());
        verdicts.extend(receiver.on_timeout(at, ROUND_TRIP).iter().map(|bytes| feedback(bytes).verdict));
        last = at;
    }
    let (given_up, needs) = verdicts.split_last().unwrap();
    assert_eq!(*given_up, Verdict::Abandoned);
    assert!(needs.len() == 4 && needs.iter().all(|verdict| matches!(verdict, Verdict::Need(_))));
    assert!(last - start < Duration::from_secs(1));
    assert_eq!(receiver.held(), 0);
    assert_eq!(receiver.on_symbol(last, &symbol(&first)), Ok(None));
    assert_eq!(receiver.poll_timeout(), None);
}

#[test]
fn a_trickle_does_not_keep_a_message_open() {
    let flight = datagrams(&mut Sender::new(5, message(500_000), 1400, &Redundancy::default()).unwrap());
    let limits = Limits { age: Duration::from_millis(100), ..Limits::default() };
    let mut receiver = Receiver::new(limits);
    let start = Instant::now();
    for (i, bytes) in flight.iter().take(11).enumerate() {
        receiver.on_symbol(start + Duration::from_millis(10) * i as u32, &symbol(bytes)).unwrap();
    }
    let end = start + Duration::from_millis(100);
    assert_eq!(receiver.poll_timeout(), Some(end));
    let abandoned = receiver.on_timeout(end, ROUND_TRIP);
    assert_eq!(feedback(&abandoned[0]).verdict, Verdict::Abandoned);
    assert_eq!(receiver.held(), 0);
}

#[test]
fn a_need_that_was_overtaken_is_not_answered() {
    let mut redundancy = Redundancy::default();
    let mut sender = Sender::new(5, message(100_000), 1400, &redundancy).unwrap();
    let mut receiver = Receiver::new(Limits::default());
    let start = Instant::now();
    let first = sender.next_datagram().unwrap();
    receiver.on_symbol(start, &symbol(&first)).unwrap();
    let need = feedback(&receiver.on_timeout(receiver.poll_timeout().unwrap(), ROUND_TRIP)[0]);
    // The window had run dry in the middle of the flight.
    let mut answer = |sender: &mut Sender, at| sender.on_feedback(at, ROUND_TRIP, &need, &mut redundancy);
    assert_eq!(answer(&mut sender, start), Answer::Send(Vec::new()));
    sender.flight_sent(start, ROUND_TRIP);
    assert_eq!(answer(&mut sender, start + ROUND_TRIP / 2), Answer::Send(Vec::new()));
    assert!(matches!(answer(&mut sender, start + ROUND_TRIP), Answer::Send(datagrams) if datagrams.len() > 70));
    assert_eq!(answer(&mut sender, start + ROUND_TRIP * 3 / 2), Answer::Send(Vec::new()));
}

#[test]
fn a_lost_done_is_asked_for_and_the_stream_is_the_last_resort() {
    let mut redundancy = Redundancy::default();
    let mut sender = Sender::new(5, message(100_000), 1400, &redundancy).unwrap();
    let mut receiver = Receiver::new(Limits::default());
    let mut now = Instant::now();
    for bytes in datagrams(&mut sender) {
        receiver.on_symbol(now, &symbol(&bytes)).unwrap();
    }
    sender.flight_sent(now, ROUND_TRIP);
    for _ in 0..3 {
        now = sender.poll_timeout().unwrap();
        let Answer::Send(probe) = sender.on_timeout(now, ROUND_TRIP) else { panic!("the stream, too early") };
        let Ok(Some(Event::Feedback(done))) = receiver.on_symbol(now, &symbol(&probe[0])) else { panic!("no answer") };
        let answer = sender.clone().on_feedback(now, ROUND_TRIP, &feedback(&done), &mut redundancy);
        assert_eq!(answer, Answer::Done);
    }
    now = sender.poll_timeout().unwrap();
    assert_eq!(sender.on_timeout(now, ROUND_TRIP), Answer::UseStream);
}
