//! `backup.control`: what a backup is, as lines of `name = value`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_wal::Lsn;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use super::{Failure, Kind};

/// Seconds since 1970 now.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or(Duration::ZERO).as_secs()).unwrap_or(i64::MAX)
}

/// The id of a backup: its start in seconds since 1970, in base 36.
pub(super) fn id_of(start: i64) -> String {
    let mut left = u64::try_from(start).unwrap_or(0);
    let mut digits = Vec::new();
    loop {
        let digit = u32::try_from(left % 36).unwrap_or(0);
        digits.push(
            char::from_digit(digit, 36)
                .unwrap_or('0')
                .to_ascii_uppercase(),
        );
        left /= 36;
        if left == 0 {
            return digits.iter().rev().collect();
        }
    }
}

/// `YYYY-MM-DD HH:MM:SS+HH[:MM]` in local time.
pub(super) fn time(seconds: i64) -> String {
    let zoned: Zoned = Timestamp::from_second(seconds)
        .unwrap_or_default()
        .to_zoned(TimeZone::system());
    let text = zoned.strftime("%Y-%m-%d %H:%M:%S").to_string();
    let offset = zoned.offset().seconds();
    let (sign, offset) = (if offset < 0 { '-' } else { '+' }, offset.abs());
    let minutes = offset % 3600 / 60;
    let tail = if minutes == 0 {
        String::new()
    } else {
        format!(":{minutes:02}")
    };
    format!("{text}{sign}{:02}{tail}", offset / 3600)
}

fn seconds_of(text: &str) -> Option<i64> {
    // jiff wants minutes in an offset.
    let text = match text.get(19..) {
        Some(offset) if offset.len() == 3 => format!("{text}:00"),
        _ => text.to_owned(),
    };
    let stamp: Timestamp = text.replacen(' ', "T", 1).parse().ok()?;
    Some(stamp.as_second())
}

/// A backup, as its control file says it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Control {
    pub(super) start: i64,
    pub(super) mode: String,
    pub(super) compress: String,
    pub(super) compress_level: u32,
    pub(super) from_replica: bool,
    pub(super) checksums: u32,
    pub(super) program_version: String,
    pub(super) server_version: String,
    pub(super) timeline: u32,
    pub(super) start_lsn: Lsn,
    pub(super) stop_lsn: Lsn,
    pub(super) end: Option<i64>,
    pub(super) recovery_xid: u64,
    pub(super) recovery_time: Option<i64>,
    pub(super) recovery_name: Option<String>,
    pub(super) data_bytes: Option<u64>,
    pub(super) wal_bytes: Option<u64>,
    pub(super) uncompressed_bytes: u64,
    pub(super) pgdata_bytes: u64,
    pub(super) status: String,
    pub(super) parent: Option<String>,
    pub(super) conninfo: Option<String>,
    pub(super) external: Vec<PathBuf>,
    pub(super) content_crc: u32,
}

impl Control {
    /// Its id.
    pub(super) fn id(&self) -> String {
        id_of(self.start)
    }

    /// The file's text.
    pub(super) fn text(&self, kind: Kind) -> String {
        let mut out = String::from("#Configuration\n");
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            out += &format!("{name} = {value}\n");
        };
        line("backup-mode", &self.mode);
        line("stream", &"true");
        line("compress-alg", &self.compress);
        line("compress-level", &self.compress_level);
        line("from-replica", &self.from_replica);
        out += "\n#Compatibility\n";
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            out += &format!("{name} = {value}\n");
        };
        line("block-size", &8192);
        line("xlog-block-size", &8192);
        line("checksum-version", &self.checksums);
        line("program-version", &self.program_version);
        if !self.server_version.is_empty() {
            line("server-version", &self.server_version);
        }
        out += "\n#Result backup info\n";
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            out += &format!("{name} = {value}\n");
        };
        line("timelineid", &self.timeline);
        line("start-lsn", &self.start_lsn);
        line("stop-lsn", &self.stop_lsn);
        line("start-time", &format!("'{}'", time(self.start)));
        if let Some(end) = self.end {
            line("end-time", &format!("'{}'", time(end)));
        }
        line("recovery-xid", &self.recovery_xid);
        if let Some(at) = self.recovery_time {
            line("recovery-time", &format!("'{}'", time(at)));
        }
        if let Some(name) = &self.recovery_name {
            line("recovery-name", &format!("'{name}'"));
        }
        if let Some(bytes) = self.data_bytes {
            line("data-bytes", &bytes);
        }
        if let Some(bytes) = self.wal_bytes {
            line("wal-bytes", &bytes);
        }
        line("uncompressed-bytes", &self.uncompressed_bytes);
        line("pgdata-bytes", &self.pgdata_bytes);
        line("status", &self.status);
        if let Some(parent) = &self.parent {
            line("parent-backup-id", &format!("'{parent}'"));
        }
        if let Some(conninfo) = &self.conninfo {
            line("primary_conninfo", &format!("'{conninfo}'"));
        }
        if !self.external.is_empty() {
            let all: Vec<_> = self.external.iter().map(|p| p.to_string_lossy()).collect();
            line("external-dirs", &format!("'{}'", all.join(":")));
        }
        if self.content_crc != 0 {
            line("content-crc", &self.content_crc);
        }
        if kind == Kind::Gs {
            out += "\n#Database Storage type\nstorage-type = FILE\n";
        }
        out
    }

    /// Reads the file's text, the real programs' too.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        let mut control = Self::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(" = ") else {
                continue;
            };
            let value = value.trim_matches('\'');
            let bad = || Failure::new(format!("Invalid value in backup.control: {line}"));
            let number = || value.parse::<u64>().map_err(|_| bad());
            let small = || value.parse::<u32>().map_err(|_| bad());
            let moment = || seconds_of(value).ok_or_else(bad);
            let lsn = || value.parse::<Lsn>().map_err(|_| bad());
            match name {
                "backup-mode" => value.clone_into(&mut control.mode),
                "compress-alg" => value.clone_into(&mut control.compress),
                "compress-level" => control.compress_level = small()?,
                "from-replica" => control.from_replica = value == "true",
                "checksum-version" => control.checksums = small()?,
                "program-version" => value.clone_into(&mut control.program_version),
                "server-version" => value.clone_into(&mut control.server_version),
                "timelineid" => control.timeline = small()?,
                "start-lsn" => control.start_lsn = lsn()?,
                "stop-lsn" => control.stop_lsn = lsn()?,
                "start-time" => control.start = moment()?,
                "end-time" => control.end = Some(moment()?),
                "recovery-xid" => control.recovery_xid = number()?,
                "recovery-time" => control.recovery_time = Some(moment()?),
                "recovery-name" => control.recovery_name = Some(value.to_owned()),
                "data-bytes" => control.data_bytes = Some(number()?),
                "wal-bytes" => control.wal_bytes = Some(number()?),
                "uncompressed-bytes" => control.uncompressed_bytes = number()?,
                "pgdata-bytes" => control.pgdata_bytes = number()?,
                "status" => value.clone_into(&mut control.status),
                "parent-backup-id" => control.parent = Some(value.to_owned()),
                "primary_conninfo" => control.conninfo = Some(value.to_owned()),
                "external-dirs" => {
                    control.external = value.split(':').map(PathBuf::from).collect();
                }
                "content-crc" => control.content_crc = small()?,
                _ => {}
            }
        }
        if control.start == 0 || control.mode.is_empty() || control.status.is_empty() {
            return Err(Failure::new("Control file is incomplete"));
        }
        Ok(control)
    }

    /// Whether it may be restored, or be a parent.
    pub(super) fn is_good(&self) -> bool {
        matches!(self.status.as_str(), "OK" | "DONE")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_times_are_the_real_ones() {
        // backup.control of TOUSA4 (gs_probackup): start-time 2026-11-21 13:03:40+00.
        let start = seconds_of("2026-11-21 13:03:40+00").unwrap();
        assert_eq!(id_of(start), "TOUSA4");
        assert_eq!(seconds_of(&time(start)), Some(start));
        assert_eq!(seconds_of("2026-11-21 15:03:40+02"), Some(start));
    }

    #[test]
    fn what_is_written_is_read() {
        let control = Control {
            start: 1_795_266_220,
            mode: "DELTA".into(),
            compress: "none".into(),
            compress_level: 1,
            program_version: "2.5.16".into(),
            server_version: "15".into(),
            timeline: 1,
            start_lsn: Lsn(0x0100_0028),
            stop_lsn: Lsn(0x1_0100_0028),
            end: Some(1_795_266_225),
            recovery_xid: 7,
            recovery_name: Some("backup X".into()),
            data_bytes: Some(5),
            status: "DONE".into(),
            parent: Some("TOUSA4".into()),
            external: vec!["/a".into(), "/b".into()],
            content_crc: 99,
            ..Control::default()
        };
        for kind in [Kind::Gs, Kind::Pg] {
            assert_eq!(Control::parse(&control.text(kind)).unwrap(), control);
        }
        assert!(Control::parse("status = OK\n").is_err());
    }
}
