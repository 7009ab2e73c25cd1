//! The end of a backup: the rest of the log, the label, the lists, the status.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Instant;

use agent_wal::{Lsn, SegmentName, SegmentSize};

use super::super::calls::{self, In, Out, SMALL, STDIO, read_whole};
use super::super::content::Entry;
use super::super::control::now;
use super::super::header_map::HeaderMap;
use super::super::log::pretty;
use super::super::sql::Stopped;
use super::super::stream::{Stream, segment_entry};
use super::super::transfer::place;
use super::super::{Failure, Kind, validate};
use super::{Backup, Connected};

impl Backup<'_> {
    /// After backup mode: the rest of the log, the label, the header map. The programs differ in the order.
    pub(super) fn end(
        &mut self,
        connected: &Connected,
        stopped: &Stopped,
        stream: Stream,
        headers: HeaderMap,
        entries: &mut Vec<Entry>,
    ) -> Result<(), Failure> {
        let log = self.catalog.log;
        let size = connected.facts.segment;
        let last = SegmentName::before_lsn(self.control.timeline, stopped.lsn, size);
        let wal = self.directory.join("database/pg_wal");
        match self.kind() {
            Kind::Gs => log.log(&format!("stop_lsn: {}", stopped.lsn)),
            Kind::Pg => log.info(&format!("stop_lsn: {}", stopped.lsn)),
        }
        log.log(&format!(
            "Looking for LSN {} in segment: {}",
            stopped.lsn,
            last.format(size)
        ));
        // A primary goes on to the next segment at the end of a backup; a standby does not.
        let until = if connected.facts.in_recovery {
            stopped.lsn
        } else {
            last.end_lsn(size)
        };
        let mut segments = stream.finish(until)?;
        let last = wal.join(last.format(size));
        match self.kind() {
            Kind::Pg => {
                read_record(&last, stopped.lsn, size)?;
                entries.extend(self.write_label(stopped)?);
                // The last segment is read once more when the stream ends.
                if let Some(entry) = segments.last_mut() {
                    // Under load it is the one after the stop position's.
                    *entry = segment_entry(&wal.join(entry.name()), entry.name())?;
                }
                log.info("Getting the Recovery Time from WAL");
                read_record(&last, stopped.lsn, size)?;
                headers.close()?;
                entries.extend(segments);
            }
            Kind::Gs => {
                log.log(&format!("Found WAL segment: {}", last.display()));
                read_record(&last, stopped.lsn, size)?;
                log.log(&format!("Found LSN: {}", stopped.lsn));
                entries.extend(self.write_label(stopped)?);
                log.log("Getting the Recovery Time from WAL");
                read_record(&last, stopped.lsn, size)?;
                headers.close()?;
                entries.extend(read_segments(&wal)?);
            }
        }
        Ok(())
    }

    /// backup_label and tablespace_map, each read back.
    fn write_label(&self, stopped: &Stopped) -> Result<Vec<Entry>, Failure> {
        let mut written = Vec::new();
        for (name, bytes) in [
            ("backup_label", &stopped.label),
            ("tablespace_map", &stopped.tablespaces),
        ] {
            if !bytes.is_empty() {
                written.push(self.write_and_read(name, bytes)?);
            }
        }
        Ok(written)
    }

    fn write_and_read(&self, name: &str, bytes: &[u8]) -> Result<Entry, Failure> {
        let path = self.directory.join("database").join(name);
        let mut out = Out::create(&path, SMALL)?;
        out.write(bytes)?;
        out.close()?;
        let found = std::fs::metadata(&path).map_err(|e| Failure::call("stat file", &path, e))?;
        let read = read_whole(&path, STDIO)?.unwrap_or_default();
        Ok(Entry {
            path: name.to_owned(),
            size: i64::try_from(found.len()).unwrap_or(i64::MAX),
            mode: std::os::unix::fs::MetadataExt::mode(&found),
            crc: crc32c::crc32c(&read),
            compress: "none".to_owned(),
            full_size: found.len(),
            ..Entry::default()
        })
    }

    pub(super) fn write_map(
        &self,
        databases: &[(u32, String)],
        entries: &mut Vec<Entry>,
    ) -> Result<(), Failure> {
        let line = |(oid, name): &(u32, String)| {
            format!("{{\"dbOid\":\"{oid}\", \"datname\":\"{name}\"}}\n")
        };
        let text: String = databases.iter().map(line).collect();
        entries.push(self.write_and_read("database_map", text.as_bytes())?);
        Ok(())
    }

    /// The list, the status, and what the options ask for beyond.
    pub(super) fn finish(&mut self, entries: &[Entry]) -> Result<(), Failure> {
        let log = self.catalog.log;
        self.catalog
            .write_content(&mut self.control, entries, true)?;
        self.catalog.write_control(&self.control)?;
        if self.args.no_sync {
            log.warning("Backup files are not synced to disk");
        } else {
            self.sync(entries)?;
        }
        self.faults.reach("end", log)?;
        self.control.end = Some(now());
        "DONE".clone_into(&mut self.control.status);
        self.catalog.write_control(&self.control)?;
        if !self.args.no_validate {
            validate::own(self.catalog, &mut self.control, entries)?;
        }
        let data = self.control.data_bytes.unwrap_or(0) + self.control.wal_bytes.unwrap_or(0);
        log.info(&format!(
            "Backup {} resident size: {}",
            self.control.id(),
            pretty(data)
        ));
        let _ = io::stdout().flush();
        Ok(())
    }

    fn sync(&self, entries: &[Entry]) -> Result<(), Failure> {
        let log = self.catalog.log;
        log.info("Syncing backup files to disk");
        let begun = Instant::now();
        for entry in entries
            .iter()
            .filter(|entry| !entry.is_directory() && entry.size > 0)
        {
            calls::sync_again(&place(&self.directory, entry))?;
        }
        log.info(&format!(
            "Backup files are synced, time elapsed: {}",
            begun.elapsed().as_secs()
        ));
        Ok(())
    }
}

/// Reads a record as the programs' WAL reader does: the first page of the segment, then the record's own.
fn read_record(segment: &Path, lsn: Lsn, size: SegmentSize) -> Result<(), Failure> {
    let mut page = [0; 8192];
    let mut file = In::existing(segment, page.len())?;
    file.seek(0)?;
    if file.read(&mut page)? < page.len() {
        return Err(Failure::new(format!(
            "Could not read WAL record at {lsn}: {} is cut short",
            segment.display()
        )));
    }
    let offset = (lsn.0 - 1) % size.bytes() / 8192 * 8192;
    if offset > 0 {
        file.seek(offset)?;
        file.read(&mut page)?;
    }
    Ok(())
}

/// gs_probackup lists the segments at the end and reads them for their CRC.
fn read_segments(wal: &Path) -> Result<Vec<Entry>, Failure> {
    let entries = std::fs::read_dir(wal).map_err(|e| Failure::call("open directory", wal, e))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    names.sort();
    names
        .iter()
        .map(|name| segment_entry(&wal.join(name), name))
        .collect()
}
