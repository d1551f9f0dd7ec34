//! The window on a link, in simulated time: bursts of 452 KB or 70 KB, a reply at once.

use std::time::{Duration, Instant};

use bytes::Bytes;
use openpi_flash_congestion::{Burst, BurstConfig};
use openpi_flash_linksim::{Cubic, End, Event, Fixed, Loss, Shape, Window, World, quantile};

const ROUND_TRIP: Duration = Duration::from_millis(20);
const DATAGRAM: usize = 1_400;
/// Between a reply and the next request.
const PAUSE: Duration = Duration::from_millis(5);
const SILENCE: Duration = Duration::from_millis(12);
const CALLS: usize = 220;
/// Calls that are not counted: the window is still learning the link.
const SETTLED: usize = 20;
/// Datagrams beyond the sources that error correction would send.
const REPAIR_SHARE: f64 = 0.07;

struct Controlled(Burst);

impl Controlled {
    fn new() -> Self {
        Self(Burst::new(BurstConfig::default(), 1452))
    }
}

impl Window for Controlled {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: usize) {
        self.0.on_ack(now, sent, bytes as u64);
    }
    fn on_end_acks(&mut self, now: Instant, in_flight: u64) {
        self.0.on_end_acks(now, in_flight);
    }
    fn on_lost(&mut self, _now: Instant, _sent: Instant, persistent: bool, bytes: usize) {
        self.0.on_congestion(bytes as u64, persistent);
    }
    fn window(&self) -> u64 {
        self.0.window()
    }
}

/// A robot that sends a request, waits for its reply, and pauses. A request is complete with as many datagrams as it has
/// sources; after a silence the rest is sent once more, as a need would have it.
struct Robot {
    flow: usize,
    length: usize,
    call: u32,
    started: Instant,
    last_arrival: Instant,
    arrived: usize,
    times: Vec<Duration>,
}

impl Robot {
    fn new(world: &mut World, window: impl Window + 'static, length: usize) -> Self {
        let flow = world.add_flow(window, Fixed(1 << 20));
        let now = world.now;
        let mut robot = Self { flow, length, call: 0, started: now, last_arrival: now, arrived: 0, times: Vec::new() };
        robot.start(world);
        world.set_timer(now + SILENCE, robot.check());
        robot
    }

    fn sources(&self) -> usize {
        self.length.div_ceil(DATAGRAM)
    }

    fn start(&mut self, world: &mut World) {
        (self.started, self.last_arrival, self.arrived) = (world.now, world.now, 0);
        self.send(world, self.sources());
    }

    fn send(&self, world: &mut World, symbols: usize) {
        let repairs = (symbols as f64 * REPAIR_SHARE) as usize + 4;
        for _ in 0..symbols + repairs {
            let mut datagram = vec![0; DATAGRAM];
            datagram[..4].copy_from_slice(&self.call.to_be_bytes());
            world.send(self.flow, End::Near, datagram.into());
        }
    }

    fn next(&self) -> u64 {
        2 * self.flow as u64
    }

    fn check(&self) -> u64 {
        self.next() + 1
    }

    fn on_event(&mut self, world: &mut World, event: &Event) {
        match event {
            Event::Datagram { flow, end, payload } if *flow == self.flow => {
                if payload[..4] != self.call.to_be_bytes() {
                    return;
                }
                if *end == End::Near {
                    self.times.push(world.now - self.started);
                    self.call += 1;
                    world.set_timer(world.now + PAUSE, self.next());
                    return;
                }
                self.arrived += 1;
                self.last_arrival = world.now;
                if self.arrived == self.sources() {
                    world.send(self.flow, End::Far, Bytes::copy_from_slice(&payload[..4]));
                }
            }
            Event::Timer(id) if *id == self.next() => self.start(world),
            Event::Timer(id) if *id == self.check() => {
                let silent = world.now - self.last_arrival > SILENCE + world.round_trip(self.flow, End::Near);
                if silent && self.arrived < self.sources() && world.queued(self.flow, End::Near) == 0 {
                    self.last_arrival = world.now;
                    self.send(world, self.sources() - self.arrived);
                }
                world.set_timer(world.now + SILENCE, self.check());
            }
            _ => {}
        }
    }
}

struct Outcome {
    times: Vec<Duration>,
    /// Packets that the buffer had no room for, per packet carried.
    overflow: f64,
}

impl Outcome {
    fn quantile(&self, q: f64) -> Duration {
        quantile(&self.times[SETTLED..], q)
    }
}

fn calls(shape: Shape, length: usize) -> Outcome {
    let clean = Shape { loss: Loss::Random(0.0), ..shape };
    let mut world = World::new(shape, clean, 7);
    let mut robot = Robot::new(&mut world, Controlled::new(), length);
    while robot.times.len() < CALLS {
        let event = world.next_event().expect("a call that never ends");
        robot.on_event(&mut world, &event);
    }
    let link = world.link(End::Near);
    let overflow = link.overflows as f64 * DATAGRAM as f64 / link.carried as f64;
    Outcome { times: robot.times, overflow }
}

/// Round trip and bytes at the link's rate, in seconds.
fn ideal(round_trip: Duration, rate: f64, length: usize) -> f64 {
    round_trip.as_secs_f64() + length as f64 * 8e-6 / rate
}

fn lossy(round_trip: Duration, rate: f64, loss: f64) -> Shape {
    Shape { loss: Loss::Random(loss), ..Shape::new(round_trip, rate) }
}

#[test]
fn answers_come_as_fast_as_the_link_permits() {
    for round_trip in [10, 20, 80].map(Duration::from_millis) {
        for rate in [20.0, 100.0, 1000.0] {
            for length in [70_000, 452_000] {
                let ideal = ideal(round_trip, rate, length);
                let clean = calls(lossy(round_trip, rate, 0.0), length);
                let slowest = clean.quantile(0.99).as_secs_f64();
                assert!(slowest <= 1.1 * ideal, "{slowest} after {ideal}: {round_trip:?} {rate} {length}");
                for (loss, p50, p99) in [(0.01, 1.03, 1.10), (0.03, 1.06, 1.15)] {
                    let moved = calls(lossy(round_trip, rate, loss), length);
                    for (q, most) in [(0.5, p50), (0.99, p99)] {
                        let times = moved.quantile(q).as_secs_f64() / clean.quantile(q).as_secs_f64();
                        assert!(times <= most, "{times} at {q}, {loss}: {round_trip:?} {rate} {length}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_first_call_is_as_fast_where_the_assumed_rate_holds() {
    for round_trip in [10, 20].map(Duration::from_millis) {
        for length in [70_000, 452_000] {
            let first = calls(lossy(round_trip, 100.0, 0.0), length).times[0].as_secs_f64();
            assert!(first <= 1.1 * ideal(round_trip, 100.0, length), "{first}");
        }
    }
}

#[test]
fn a_short_buffer_is_not_overrun_for_long() {
    for rate in [20.0, 100.0] {
        for length in [70_000, 452_000] {
            let shape = Shape { buffer: Duration::from_millis(10), ..Shape::new(ROUND_TRIP, rate) };
            let outcome = calls(shape, length);
            assert!(outcome.overflow <= 0.01, "{}", outcome.overflow);
            assert!(outcome.quantile(0.99).as_secs_f64() <= 1.1 * ideal(ROUND_TRIP, rate, length));
        }
    }
}

#[test]
fn the_window_follows_the_link() {
    let shapes = [100.0, 20.0, 100.0].map(|rate| (rate, Shape::new(ROUND_TRIP, rate)));
    let mut world = World::new(shapes[0].1, shapes[0].1, 7);
    let mut robot = Robot::new(&mut world, Controlled::new(), 452_000);
    for (rate, shape) in shapes {
        world.link(End::Near).reshape(shape);
        robot.times.clear();
        while robot.times.len() < 20 {
            let event = world.next_event().expect("a call that never ends");
            robot.on_event(&mut world, &event);
        }
        let slowest = robot.times[10..].iter().max().expect("ten calls").as_secs_f64();
        assert!(slowest <= 1.1 * ideal(ROUND_TRIP, rate, 452_000), "{slowest} at {rate}");
    }
}

/// A robot that calls back to back against a TCP flow that always has something to send, for 20 s on 100 Mbit/s.
/// Returns the share of the link that each got, and the robot's calls.
fn compete(buffer: Duration) -> (f64, f64, Vec<Duration>) {
    const DURATION: Duration = Duration::from_secs(20);
    let shape = Shape { buffer, ..Shape::new(ROUND_TRIP, 100.0) };
    let mut world = World::new(shape, shape, 7);
    let mut robot = Robot::new(&mut world, Controlled::new(), 452_000);
    let tcp = world.add_flow(Cubic::default(), Fixed(1 << 20));
    let start = world.now;
    let (mut robot_bytes, mut tcp_bytes) = (0, 0);
    while world.now - start < DURATION {
        while world.queued(tcp, End::Near) < 100 {
            world.send(tcp, End::Near, Bytes::from_static(&[0; DATAGRAM]));
        }
        let event = world.next_event().expect("flows that never end");
        match event {
            Event::Datagram { flow, end: End::Far, .. } if flow == tcp => tcp_bytes += DATAGRAM,
            Event::Datagram { end: End::Far, .. } => robot_bytes += DATAGRAM,
            _ => {}
        }
        robot.on_event(&mut world, &event);
    }
    let share = |bytes: usize| bytes as f64 / (shape.rate * DURATION.as_secs_f64());
    (share(robot_bytes), share(tcp_bytes), robot.times)
}

#[test]
fn beside_a_tcp_flow_both_keep_a_share() {
    for buffer in [10, 30, 100].map(Duration::from_millis) {
        let (robot, tcp, times) = compete(buffer);
        println!("{buffer:?}: robot {robot:.2}, TCP {tcp:.2}, p50 {:?}", quantile(&times, 0.5));
        assert!(tcp >= 0.5, "{tcp}");
        assert!(robot >= 0.15, "{robot}");
        // Half of the link, behind a full buffer.
        let fair = ideal(ROUND_TRIP + buffer, 50.0, 452_000);
        assert!(quantile(&times, 0.5).as_secs_f64() <= 1.5 * fair, "{times:?}");
    }
}
