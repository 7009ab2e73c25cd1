//! Moments as people give them on the command line.

use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// A moment: RFC 3339, or a date and a time of this machine's own zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) Timestamp);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        of_zone(text, &TimeZone::system())
    }
}

fn of_zone(text: &str, zone: &TimeZone) -> Result<Moment, String> {
    let text = text.trim();
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(Moment(moment));
    }
    let form = || {
        "write it like `2026-11-21T04:02:33Z`, `2026-11-21T04:02:33+08:00`, or `2026-11-21 04:02:33` for this machine's \
         own time"
            .to_owned()
    };
    // A day alone may mean its beginning or its end.
    let local: DateTime = match text.parse() {
        Ok(local) if text.contains(':') => local,
        _ => return Err(form()),
    };
    let moment = zone.to_ambiguous_timestamp(local).unambiguous();
    moment.map(Moment).map_err(|_| {
        format!(
            "the clocks were changed then, so it is no moment, or two: {}",
            form()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_exact_or_refused() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let of = |text: &str| of_zone(text, &zone).map(|it| it.0.to_string());
        for text in [
            "2026-11-21T04:02:33Z",
            "2026-11-21T05:02:33+01:00",
            "2026-11-21 05:02:33",
            "2026-11-21T05:02:33",
        ] {
            assert_eq!(of(text).as_deref(), Ok("2026-11-21T04:02:33Z"), "{text}");
        }
        assert_eq!(
            of("2026-07-01 05:02").as_deref(),
            Ok("2026-07-01T03:02:00Z")
        );
        for text in ["", "now", "2026-11-21", "04:02", "2026-11-21 25:00"] {
            assert!(of(text).is_err(), "{text}");
        }
        // An hour that was twice, and one that was not.
        for text in ["2026-10-25 02:30", "2026-03-29 02:30"] {
            assert!(of(text).unwrap_err().contains("clocks"), "{text}");
        }
        assert!(of("2026-10-25T02:30:00+01:00").is_ok());
    }
}
