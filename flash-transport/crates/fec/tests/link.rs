//! Losses cost next to nothing: requests and replies back to back over a lossy link, in simulated time.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use openpi_flash_fec::{Answer, Datagram, Event as Arrival, Limits, Receiver, Redundancy, Sender};
use openpi_flash_linksim::{End, Event, Fixed, Loss, Shape, World, quantile};

const ROUND_TRIP: Duration = Duration::from_millis(20);
const REPLY: usize = 3_000;
const DATAGRAM: usize = 1_400;
const CALLS: u32 = 400;
/// Calls before this one are not counted: the redundancy is still learning the link.
const SETTLED: u32 = 50;

/// Both sides of one connection at one end.
struct Peer {
    end: End,
    receiver: Receiver,
    redundancy: Redundancy,
    senders: BTreeMap<u32, Sender>,
    /// The message that the transport still queues.
    unsent: Option<u32>,
    /// Messages that had to be sent over the stream.
    fallbacks: usize,
}

impl Peer {
    fn new(end: End) -> Self {
        let receiver = Receiver::new(Limits::default());
        Self { end, receiver, redundancy: Redundancy::default(), senders: BTreeMap::new(), unsent: None, fallbacks: 0 }
    }

    fn send(&mut self, world: &mut World, id: u32, message: Bytes) {
        let mut sender = Sender::new(id, message, DATAGRAM, &self.redundancy).unwrap();
        while let Some(datagram) = sender.next_datagram() {
            world.send(0, self.end, datagram);
        }
        self.senders.insert(id, sender);
        self.unsent = Some(id);
    }

    /// Notes when the newest message has left the queue.
    fn on_progress(&mut self, world: &World) {
        if world.queued(0, self.end) == 0
            && let Some(sender) = self.unsent.take().and_then(|id| self.senders.get_mut(&id))
        {
            sender.flight_sent(world.now, world.round_trip(0, self.end));
        }
    }

    /// Takes in a datagram and returns the message that it completed.
    fn on_datagram(&mut self, world: &mut World, payload: &Bytes) -> Option<(u32, Bytes)> {
        match Datagram::parse(payload).unwrap() {
            Datagram::Symbol(symbol) => match self.receiver.on_symbol(world.now, &symbol).unwrap()? {
                Arrival::Complete { message, body, feedback } => {
                    world.send(0, self.end, feedback);
                    Some((message, body))
                }
                Arrival::Feedback(feedback) => {
                    world.send(0, self.end, feedback);
                    None
                }
            },
            Datagram::Feedback(feedback) => {
                let sender = self.senders.get_mut(&feedback.message)?;
                let round_trip = world.round_trip(0, self.end);
                let answer = sender.on_feedback(world.now, round_trip, &feedback, &mut self.redundancy);
                self.follow(world, feedback.message, answer);
                None
            }
        }
    }

    fn follow(&mut self, world: &mut World, id: u32, answer: Answer) {
        match answer {
            Answer::Done => drop(self.senders.remove(&id)),
            Answer::Send(datagrams) => datagrams.into_iter().for_each(|one| world.send(0, self.end, one)),
            Answer::UseStream => {
                self.senders.remove(&id);
                self.fallbacks += 1;
            }
        }
    }

    fn on_timeout(&mut self, world: &mut World) {
        let round_trip = world.round_trip(0, self.end);
        if self.receiver.poll_timeout().is_some_and(|at| at <= world.now) {
            for feedback in self.receiver.on_timeout(world.now, round_trip) {
                world.send(0, self.end, feedback);
            }
        }
        for id in self.senders.keys().copied().collect::<Vec<_>>() {
            if let Some(sender) =
                self.senders.get_mut(&id).filter(|sender| sender.poll_timeout().is_some_and(|at| at <= world.now))
            {
                let answer = sender.on_timeout(world.now, world.round_trip(0, self.end));
                self.follow(world, id, answer);
            }
        }
    }
}

struct Outcome {
    p50: Duration,
    p99: Duration,
    fallbacks: usize,
    /// Bytes on the line, headers included, per byte of requests.
    expansion: f64,
}

/// Calls back to back, each a request of `length` bytes and its reply, at `rate` Mbit/s and a loss in both directions.
fn calls(length: usize, rate: f64, loss: Loss) -> Outcome {
    let shape = Shape { loss, ..Shape::new(ROUND_TRIP, rate) };
    let mut world = World::new(shape, shape, 42);
    let window = 1.3 * shape.rate * ROUND_TRIP.as_secs_f64();
    world.add_flow(Fixed(window as u64), Fixed(window as u64));
    let (mut robot, mut server) = (Peer::new(End::Near), Peer::new(End::Far));
    let request = Bytes::from((0..length).map(|i| i as u8).collect::<Vec<_>>());
    let mut times = Vec::new();
    let (mut started, mut wake_at) = (world.now, world.now);
    robot.send(&mut world, 0, request.clone());
    while (times.len() as u32) < CALLS {
        match world.next_event().expect("a call that never ends") {
            Event::Datagram { end: End::Far, payload, .. } => {
                if let Some((id, body)) = server.on_datagram(&mut world, &payload) {
                    assert_eq!(body, request);
                    server.send(&mut world, id, Bytes::from(vec![id as u8; REPLY]));
                }
            }
            Event::Datagram { payload, .. } => {
                if let Some((id, body)) = robot.on_datagram(&mut world, &payload) {
                    assert_eq!(body, vec![id as u8; REPLY]);
                    times.push(world.now - started);
                    started = world.now;
                    robot.send(&mut world, id + 1, request.clone());
                }
            }
            Event::Timer(_) => {
                robot.on_timeout(&mut world);
                server.on_timeout(&mut world);
            }
        }
        for peer in [&mut robot, &mut server] {
            peer.on_progress(&world);
            let timeouts = peer.senders.values().filter_map(Sender::poll_timeout);
            let at = peer.receiver.poll_timeout().into_iter().chain(timeouts).min();
            if let Some(at) = at.filter(|&at| wake_at <= world.now || at < wake_at) {
                wake_at = at;
                world.set_timer(at, 0);
            }
        }
    }
    let settled = &times[SETTLED as usize..];
    Outcome {
        p50: quantile(settled, 0.5),
        p99: quantile(settled, 0.99),
        fallbacks: robot.fallbacks + server.fallbacks,
        expansion: world.link(End::Near).carried as f64 / (length as f64 * f64::from(CALLS)),
    }
}

/// Round trip and bytes at the link's rate.
fn ideal(length: usize, rate: f64) -> Duration {
    ROUND_TRIP + Duration::from_secs_f64((length + REPLY) as f64 * 8e-6 / rate)
}

fn times(duration: Duration, base: Duration) -> f64 {
    duration.as_secs_f64() / base.as_secs_f64()
}

#[test]
fn a_clean_link_costs_its_headers() {
    for length in [452_000, 70_000] {
        let clean = calls(length, 100.0, Loss::Random(0.0));
        println!("{length}: {:?} {:?} {:.3}", clean.p50, clean.p99, clean.expansion);
        assert_eq!(clean.fallbacks, 0);
        assert!(times(clean.p99, ideal(length, 100.0)) <= 1.1, "{:?}", clean.p99);
        assert!(clean.expansion <= 1.14, "{}", clean.expansion);
    }
}

#[test]
fn random_losses_move_the_answer_by_little() {
    for rate in [20.0, 100.0] {
        for length in [452_000, 70_000] {
            let clean = calls(length, rate, Loss::Random(0.0));
            for (loss, p50, p99) in [(0.01, 1.03, 1.10), (0.03, 1.06, 1.15)] {
                let lossy = calls(length, rate, Loss::Random(loss));
                println!(
                    "{length} {rate} {loss}: {:?} {:?} {:.3} {}",
                    lossy.p50, lossy.p99, lossy.expansion, lossy.fallbacks
                );
                assert_eq!(lossy.fallbacks, 0);
                assert!(times(lossy.p50, clean.p50) <= p50, "{:?} after {:?}", lossy.p50, clean.p50);
                assert!(times(lossy.p99, clean.p99) <= p99, "{:?} after {:?}", lossy.p99, clean.p99);
            }
        }
    }
}

/// A burst that the redundancy has not met yet costs one round trip of asking, and later ones of its kind less.
#[test]
fn bursts_cost_at_most_a_round_trip_and_a_silence() {
    let bursts =
        Loss::Bursts { every: Duration::from_millis(700), length: Duration::from_millis(30), probability: 0.15 };
    for length in [452_000, 70_000] {
        let clean = calls(length, 100.0, Loss::Random(0.0));
        let moved = calls(length, 100.0, bursts);
        println!("{length}: {:?} {:?} {:.3} {}", moved.p50, moved.p99, moved.expansion, moved.fallbacks);
        assert_eq!(moved.fallbacks, 0);
        assert!(times(moved.p50, clean.p50) <= 1.03, "{:?} after {:?}", moved.p50, clean.p50);
        assert!(moved.p99 <= clean.p99 + ROUND_TRIP + Duration::from_millis(15), "{:?}", moved.p99);
    }
}
