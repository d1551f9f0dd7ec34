//! quinn's runtime on tokio, with timers that are exact to some microseconds where the system has them.
//!
//! tokio rounds timers up to a millisecond. quinn's pacer refills for 1.6 ms at a time and does not make up for time
//! lost, so that on tokio's timers a burst leaves at two thirds of its pace, and a fast link runs dry in the middle of it.

use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

/// A runtime for an end that sends bursts. Each connection takes a file descriptor.
#[derive(Debug)]
pub struct ExactRuntime;

impl Runtime for ExactRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        #[cfg(target_os = "linux")]
        if let Ok(timer) = exact::Timer::new(at) {
            return Box::pin(timer);
        }
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(target_os = "linux")]
mod exact {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use std::time::{Duration, Instant};

    use quinn::AsyncTimer;
    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
    };
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    #[derive(Debug)]
    pub struct Timer {
        clock: AsyncFd<OwnedFd>,
        at: Instant,
    }

    impl Timer {
        /// Fails where no more files can be opened.
        pub fn new(at: Instant) -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let clock = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            #[allow(deprecated, reason = "safe for what owns its file and lends it to nobody, as this does")]
            let clock = AsyncFd::with_interest(clock, Interest::READABLE)?;
            let mut timer = Self { clock, at };
            timer.set(at);
            Ok(timer)
        }

        fn set(&mut self, at: Instant) {
            self.at = at;
            // Zero would stop the clock.
            let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
            let value = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) as _ };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            // It fails for what is no timer and for no time alone.
            let _ = timerfd_settime(self.clock.get_ref(), TimerfdTimerFlags::empty(), &once);
        }
    }

    impl AsyncTimer for Timer {
        fn reset(self: Pin<&mut Self>, at: Instant) {
            self.get_mut().set(at);
        }

        fn poll(self: Pin<&mut Self>, context: &mut Context) -> Poll<()> {
            let timer = self.get_mut();
            loop {
                match timer.clock.poll_read_ready(context) {
                    Poll::Ready(Ok(mut ready)) => {
                        if Instant::now() >= timer.at {
                            return Poll::Ready(());
                        }
                        ready.clear_ready(); // of the time before the last reset
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(()), // the runtime is stopping
                    Poll::Pending => return Poll::Pending,
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use std::future::poll_fn;

        use super::*;

        #[tokio::test]
        async fn a_timer_goes_off_when_it_is_due_and_not_before() {
            let mut timer = Box::pin(Timer::new(Instant::now()).unwrap());
            for milliseconds in [0, 3, 1, 0, 7] {
                let due = Instant::now() + Duration::from_millis(milliseconds);
                timer.as_mut().reset(due);
                poll_fn(|context| timer.as_mut().poll(context)).await;
                assert!(Instant::now() >= due);
            }
            let earlier = Instant::now() + Duration::from_millis(2);
            timer.as_mut().reset(Instant::now() + Duration::from_secs(3600));
            timer.as_mut().reset(earlier);
            poll_fn(|context| timer.as_mut().poll(context)).await;
        }
    }
}
