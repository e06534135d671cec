//! The one place that tries again: transient failures, with growing pauses, until a deadline.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Limits;
use crate::error::{Error, Result};

/// The pause before the second attempt is at most this long; it doubles from then on.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Returns what `attempt` returns, started again after transient errors as long as `limits` let it.
///
/// `what` names the call in messages; `bytes` is what one attempt moves. Attempts are numbered from 1.
///
/// # Errors
/// The first error that is not transient; [`Error::Unavailable`] with the last one's text and the
/// number of attempts when time is up. An attempt that exceeds its own time counts as transient.
///
/// # Cancel safety
/// An attempt is dropped where it stands: what it asked the store to do may still happen.
pub async fn retried<T, F, Fut>(
    limits: Limits,
    bytes: u64,
    what: impl fmt::Display,
    mut attempt: F,
) -> Result<T>
where
    F: FnMut(u32) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let started = Instant::now();
    let deadline = started + limits.deadline(bytes);
    for number in 1_u32.. {
        let left = deadline.saturating_duration_since(Instant::now());
        let error = match timeout(limits.request(bytes).min(left), attempt(number)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) if !error.is_transient() => return Err(error.context(what)),
            Ok(Err(error)) => error,
            Err(_) => Error::unavailable(format!(
                "no answer within {} ms",
                limits.request(bytes).min(left).as_millis()
            )),
        };
        let pause = pause_after(number, rand::random());
        if Instant::now() + pause >= deadline {
            let attempts = if number == 1 { "1 attempt".to_owned() } else { format!("{number} attempts") };
            let seconds = started.elapsed().as_secs_f64();
            return Err(error.context(format!("{what}: gave up after {attempts} in {seconds:.1} s")));
        }
        tracing::debug!("{what}: attempt {number} failed, next in {} ms: {error}", pause.as_millis());
        sleep(pause).await;
    }
    unreachable!("the loop ends by its deadline")
}

/// The pause after the attempt with this number: half of it is fixed, half is `random`, so that
/// many clients that failed together do not come back together.
fn pause_after(number: u32, random: u32) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(1 << (number - 1).min(16)).min(LONGEST_PAUSE);
    let half = whole / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(request_ms: u64, deadline_ms: u64) -> Limits {
        Limits { connect_ms: 1, request_ms, deadline_ms }
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        for number in 1..100 {
            let (least, most) = (pause_after(number, 0), pause_after(number, u32::MAX));
            assert!(least <= most && most <= LONGEST_PAUSE && least * 2 >= most, "{number}");
            assert!(least <= pause_after(number + 1, 0));
        }
    }

    #[tokio::test]
    async fn a_transient_error_is_tried_again_and_another_is_not() {
        let mut seen = 0;
        let result = retried(limits(1000, 10_000), 0, "get x", |number| {
            seen = number;
            async move { if number < 3 { Err(Error::unavailable("503")) } else { Ok(number) } }
        })
        .await;
        assert_eq!((result.unwrap(), seen), (3, 3));

        let result: Result<()> =
            retried(limits(1000, 10_000), 0, "get x", |_| async { Err(Error::denied("no")) }).await;
        assert!(matches!(result, Err(Error::Denied(_))));
    }

    #[tokio::test]
    async fn the_deadline_ends_it() {
        let result: Result<()> = retried(limits(20, 300), 0, "get x", |_| std::future::pending()).await;
        let error = result.unwrap_err();
        assert!(error.is_transient());
        assert!(error.to_string().starts_with("get x: gave up after "), "{error}");
        assert!(error.to_string().contains("no answer within"), "{error}");
    }
}
