//! What error correction costs the processor, per message: `cargo run --release -p openpi-flash-fec --example cost`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use openpi_flash_fec::{Datagram, Event, Limits, Receiver, Redundancy, Sender, warm_up};

fn main() {
    let start = Instant::now();
    warm_up();
    println!("tables: {:?}, once", start.elapsed());
    for length in [3_000, 70_000, 452_000, 2_764_800] {
        let message = Bytes::from(vec![7; length]);
        let (mut sent, mut whole, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
        for id in 0..200 {
            let start = Instant::now();
            let mut sender = Sender::new(id, message.clone(), 1400, &Redundancy::default()).unwrap();
            let flight: Vec<Bytes> = std::iter::from_fn(|| sender.next_datagram()).collect();
            sent.push(start.elapsed());
            whole.push(receive(&flight, id, &message));
            decoded.push(receive(&flight[2..], id, &message));
        }
        let [sent, whole, decoded] = [sent, whole, decoded].map(median);
        println!("{length} bytes: sending {sent:?}, receiving {whole:?}, receiving with two symbols lost {decoded:?}");
    }
}

fn receive(flight: &[Bytes], id: u32, message: &Bytes) -> Duration {
    let start = Instant::now();
    let mut receiver = Receiver::new(Limits::default());
    for datagram in flight {
        let Ok(Datagram::Symbol(symbol)) = Datagram::parse(datagram) else { unreachable!() };
        if let Ok(Some(Event::Complete { body, .. })) = receiver.on_symbol(start, &symbol) {
            let took = start.elapsed();
            assert_eq!(body, *message);
            return took;
        }
    }
    panic!("message {id} is not complete");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
