//! What a peer cannot exceed: connections, handshakes, requests and bytes.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What a peer cannot exceed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections, those in their handshake included.
    pub connections: usize,
    /// Connections of one address (IPv6: of one /64).
    pub connections_per_address: usize,
    /// Handshakes at once of one address.
    pub handshakes_per_address: usize,
    /// Handshakes at once beyond which a client must first show that it receives what is sent to its address (Retry).
    pub handshakes_before_retry: usize,
    /// Streams at once of one connection.
    pub streams: u32,
    /// Requests at once that the gateway is asked; more are refused at once.
    pub requests: usize,
    /// Bytes of the largest request, and of the largest answer.
    pub body_bytes: usize,
    /// Bytes of requests that one connection may have in flight.
    pub connection_bytes: usize,
    /// Bytes of requests that all connections may have in flight.
    pub total_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_address: 256,
            handshakes_per_address: 32,
            handshakes_before_retry: 64,
            streams: 64,
            requests: 64,
            body_bytes: 64 << 20,
            connection_bytes: 128 << 20,
            total_bytes: 512 << 20,
        }
    }
}

/// What becomes of a client's first packet.
pub(crate) enum Admission {
    /// A handshake is begun.
    Accept(Place),
    /// The client is to show that it has its address.
    Retry,
    /// It is told that the server takes it not.
    Refuse,
}

/// Counts connections.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: Limits,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    connections: usize,
    handshakes: usize,
    by_address: HashMap<IpAddr, PerAddress>,
}

#[derive(Debug, Default)]
struct PerAddress {
    connections: usize,
    handshakes: usize,
}

impl Gate {
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, counts: Mutex::default() })
    }

    /// Decides about a client. An address that is not `validated` may be somebody else's, so that only a Retry, which
    /// keeps no state, is held against it.
    pub fn admit(self: &Arc<Self>, address: IpAddr, validated: bool) -> Admission {
        let address = group(address);
        let limits = &self.limits;
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let full = counts.connections >= limits.connections;
        let crowded = counts.by_address.get(&address).is_some_and(|own| {
            own.connections >= limits.connections_per_address || own.handshakes >= limits.handshakes_per_address
        });
        if !validated && (crowded || full || counts.handshakes >= limits.handshakes_before_retry) {
            return Admission::Retry;
        }
        if crowded || full {
            return Admission::Refuse;
        }
        counts.connections += 1;
        counts.handshakes += 1;
        let own = counts.by_address.entry(address).or_default();
        own.connections += 1;
        own.handshakes += 1;
        Admission::Accept(Place { gate: Arc::clone(self), address, in_handshake: true })
    }
}

/// A connection, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Arc<Gate>,
    address: IpAddr,
    in_handshake: bool,
}

impl Place {
    /// The handshake is over.
    pub fn established(&mut self) {
        if std::mem::take(&mut self.in_handshake) {
            let mut counts = self.gate.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.handshakes -= 1;
            if let Some(own) = counts.by_address.get_mut(&self.address) {
                own.handshakes -= 1;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.established();
        let mut counts = self.gate.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.connections -= 1;
        if let Some(own) = counts.by_address.get_mut(&self.address) {
            own.connections -= 1;
            if own.connections == 0 {
                counts.by_address.remove(&self.address);
            }
        }
    }
}

/// A host's address, or the network that an IPv6 host picks its addresses from.
fn group(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

/// A number that cannot grow past its limit.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicUsize,
    limit: usize,
    /// Of which this is a part.
    whole: Option<Arc<Budget>>,
}

impl Budget {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit, whole: None })
    }

    /// A part, what is taken of which is taken of the whole, too. It may not grow past what is then left of the whole: so
    /// `n` greedy parts leave an `n+1`-th of it to others, and nobody is shut out.
    pub fn within(whole: &Arc<Self>, limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit, whole: Some(Arc::clone(whole)) })
    }

    /// Nothing of the budget yet.
    pub fn hold(self: &Arc<Self>) -> Held {
        Held { budget: Arc::clone(self), amount: 0 }
    }

    fn take(&self, amount: usize) -> bool {
        if self.whole.as_ref().is_some_and(|whole| !whole.take(amount)) {
            return false;
        }
        let left = self.whole.as_ref().map(|whole| whole.limit.saturating_sub(whole.used.load(Ordering::Relaxed)));
        let limit = left.map_or(self.limit, |left| left.min(self.limit));
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(amount).filter(|sum| *sum <= limit)
        });
        if taken.is_err()
            && let Some(whole) = &self.whole
        {
            whole.give_back(amount);
        }
        taken.is_ok()
    }

    fn give_back(&self, amount: usize) {
        self.used.fetch_sub(amount, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.give_back(amount);
        }
    }
}

/// A part of a budget, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    budget: Arc<Budget>,
    amount: usize,
}

impl Held {
    /// Takes more; false, and nothing taken, where that would exceed the limit. Nothing is always to be had.
    #[must_use]
    pub fn grow(&mut self, amount: usize) -> bool {
        let grown = amount == 0 || self.budget.take(amount);
        self.amount += if grown { amount } else { 0 };
        grown
    }

    /// Takes or gives back what makes it `amount`; false, and nothing taken, where that would exceed the limit.
    #[must_use]
    pub fn set(&mut self, amount: usize) -> bool {
        let surplus = self.amount.saturating_sub(amount);
        self.budget.give_back(surplus);
        self.amount -= surplus;
        self.grow(amount - self.amount)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give_back(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

    fn gate(connections: usize, per_address: usize, before_retry: usize) -> Arc<Gate> {
        Gate::new(Limits {
            connections,
            connections_per_address: per_address,
            handshakes_per_address: 2,
            handshakes_before_retry: before_retry,
            ..Limits::default()
        })
    }

    fn place(admission: Admission) -> Place {
        match admission {
            Admission::Accept(place) => place,
            Admission::Retry => panic!("retry"),
            Admission::Refuse => panic!("refused"),
        }
    }

    #[test]
    fn an_address_has_its_share_and_no_more() {
        let gate = gate(10, 3, 10);
        let mut places: Vec<_> = (0..2).map(|_| place(gate.admit(HERE, true))).collect();
        assert!(matches!(gate.admit(HERE, true), Admission::Refuse));
        places.iter_mut().for_each(Place::established);
        places.push(place(gate.admit(HERE, true)));
        assert!(matches!(gate.admit(HERE, true), Admission::Refuse));
        let same_network = "::9".parse().unwrap();
        assert!(matches!(gate.admit(same_network, true), Admission::Refuse));
        place(gate.admit("10.0.0.1".parse().unwrap(), true));
        places.clear();
        let counts = gate.counts.lock().unwrap();
        assert_eq!((counts.connections, counts.handshakes, counts.by_address.len()), (0, 0, 0));
    }

    #[test]
    fn an_address_that_may_be_forged_is_never_refused() {
        let gate = gate(2, 2, 10);
        let _places: Vec<_> = (0..2).map(|_| place(gate.admit(HERE, true))).collect();
        assert!(matches!(gate.admit(HERE, false), Admission::Retry));
        assert!(matches!(gate.admit("10.0.0.1".parse().unwrap(), false), Admission::Retry));
        assert!(matches!(gate.admit("10.0.0.1".parse().unwrap(), true), Admission::Refuse));
    }

    #[test]
    fn many_handshakes_ask_for_an_address_that_receives() {
        let gate = gate(10, 10, 1);
        let mut first = place(gate.admit(HERE, false));
        assert!(matches!(gate.admit(HERE, false), Admission::Retry));
        place(gate.admit(HERE, true));
        first.established();
        place(gate.admit(HERE, false));
    }

    #[test]
    fn a_budget_is_not_exceeded_and_comes_back() {
        let budget = Budget::new(10);
        let (mut one, mut other) = (budget.hold(), budget.hold());
        assert!(one.grow(7) && !other.grow(4) && other.grow(3) && !other.grow(1));
        drop(one);
        assert!(other.grow(7));
        assert!(!other.grow(usize::MAX));
        assert!(!other.set(11) && other.set(10) && other.set(3));
        assert_eq!(budget.used.load(Ordering::Relaxed), 3);
        drop(other);
        assert_eq!(budget.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn greedy_parts_leave_room_for_others() {
        let whole = Budget::new(1000);
        let parts: Vec<_> = (0..4).map(|_| Budget::within(&whole, 600)).collect();
        let mut held: Vec<_> = parts.iter().map(Budget::hold).collect();
        for _ in 0..100 {
            for greedy in &mut held[..3] {
                let _ = greedy.grow(10);
            }
        }
        for part in &parts[..3] {
            assert!(part.used.load(Ordering::Relaxed) <= 250);
        }
        assert!((0..10).all(|_| held[3].grow(10)), "a newcomer gets something");
        assert!(whole.used.load(Ordering::Relaxed) <= 1000);
        drop(held);
        assert_eq!(whole.used.load(Ordering::Relaxed), 0);
    }
}
