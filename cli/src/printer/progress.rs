//! One bar a node: phase, bytes, rate, time left.

use std::time::Duration;

use agent_api::{Phase, Progress};
use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};

/// The bar of one node.
#[derive(Debug)]
pub(crate) struct NodeBar {
    bar: ProgressBar,
}

impl NodeBar {
    pub(super) fn new(bars: Option<&MultiProgress>, name: &str) -> Self {
        let bar = match bars {
            Some(bars) => bars.add(ProgressBar::new(0)),
            None => ProgressBar::hidden(),
        };
        bar.set_prefix(name.to_owned());
        bar.set_message("connecting");
        bar.set_style(style());
        Self { bar }
    }

    /// Shows the phase.
    pub(crate) fn phase(&self, phase: Phase) {
        self.bar.set_message(phase.name());
        if phase.is_end() {
            self.bar.abandon();
        }
    }

    /// Shows a word of its own in place of a phase.
    pub(crate) fn says(&self, what: &'static str) {
        self.bar.set_message(what);
    }

    /// Shows how far it is.
    pub(crate) fn progress(&self, progress: &Progress) {
        self.bar
            .set_length(progress.bytes_total.max(progress.bytes_done));
        self.bar.set_position(progress.bytes_done);
    }
}

impl Drop for NodeBar {
    fn drop(&mut self) {
        if !self.bar.is_finished() {
            self.bar.abandon();
        }
    }
}

fn style() -> ProgressStyle {
    const TEMPLATE: &str = "{prefix} {msg:10} [{bar:24}] {binary_bytes:>10}/{binary_total_bytes:<10} {rate:>12} {left}";
    let style =
        ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    style
        .progress_chars("=> ")
        .with_key(
            "rate",
            |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = write!(out, "{}/s", bytes(whole(state.per_sec())));
            },
        )
        .with_key(
            "left",
            |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                if state.pos() > 0 && state.len().is_some_and(|len| len > state.pos()) {
                    let _ = write!(out, "{} left", duration(state.eta()));
                }
            },
        )
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest integer that fits"
)]
fn whole(rate: f64) -> u64 {
    rate as u64
}

/// Bytes for people: `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut tenths, mut unit) = (u128::from(count) * 10 / 1024, 0);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A time span for people: `2h 05m`, `3m 07s`, `4.2s`.
pub(crate) fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..10 => format!("{seconds}.{}s", span.subsec_millis() / 100),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_for_people() {
        let shown: Vec<_> = [0, 1023, 1024, 1536, (1 << 20) - 1, 3 << 30, u64::MAX]
            .map(bytes)
            .into();
        assert_eq!(
            shown,
            [
                "0 B",
                "1023 B",
                "1.0 KiB",
                "1.5 KiB",
                "1023.9 KiB",
                "3.0 GiB",
                "16383.9 PiB"
            ]
        );
    }

    #[test]
    fn spans_for_people() {
        let shown: Vec<_> = [4_250, 59_900, 187_000, 7_500_000]
            .map(|ms| duration(Duration::from_millis(ms)))
            .into();
        assert_eq!(shown, ["4.2s", "59s", "3m 07s", "2h 05m"]);
    }
}
