//! `validate`: reads all of a backup and holds it against what its list says.

use std::collections::HashMap;
use std::path::Path;

use agent_wal::page::{self, Page, PageCheck};

use super::calls::{In, STDIO, read_whole};
use super::catalog::Catalog;
use super::chain;
use super::content::{Entry, UNCHANGED};
use super::control::Control;
use super::copy::control_crc;
use super::faults::Faults;
use super::header_map;
use super::locks::Lock;
use super::restore::read_page;
use super::transfer::{PG_CONTROL, place};
use super::{Failure, Kind};

/// pg_probackup reads data files in pieces of a page here.
const PAGE: usize = 8192;
/// Pages in a file of a relation.
const SEGMENT_BLOCKS: u32 = 131_072;

/// What was found in one file.
enum Found {
    Good,
    /// Bad, in words; gs_probackup takes some as a warning only.
    Bad {
        words: String,
        counts: bool,
    },
}

/// `validate`: one backup and those it stands on, or all.
pub(super) fn run(catalog: &Catalog, id: Option<&str>, faults: &Faults) -> Result<(), Failure> {
    let log = catalog.log;
    log.log("Validate begin.");
    catalog.configuration()?;
    let all = catalog.list()?;
    let wanted: Vec<&Control> = match id {
        Some(id) => {
            let found = all.iter().find(|control| control.id() == id);
            vec![
                found
                    .ok_or_else(|| Failure::new(format!("Requested backup {id} is not found.")))?,
            ]
        }
        None => all
            .iter()
            .filter(|control| control.status != "ERROR")
            .collect(),
    };
    for control in wanted {
        chain_of(catalog, &all, control, faults)?;
        log.info(&format!("Validate of backup {} completed.", control.id()));
    }
    Ok(())
}

fn chain_of(
    catalog: &Catalog,
    all: &[Control],
    control: &Control,
    faults: &Faults,
) -> Result<(), Failure> {
    chain(catalog, &chain::of(all, control)?, faults)?;
    let id = control.id();
    catalog.log.info(&format!("Backup {id} is valid."));
    Ok(())
}

/// Validates a chain, its FULL first, and the WAL of the newest.
pub(super) fn chain(catalog: &Catalog, chain: &[Control], faults: &Faults) -> Result<(), Failure> {
    let log = catalog.log;
    if let (Kind::Pg, [newest, _, ..]) = (catalog.kind, chain) {
        log.info(&format!("Validating parents for backup {}", newest.id()));
    }
    faults.reach("restoring", log)?;
    for control in chain.iter().rev() {
        let directory = catalog.backup(&control.id());
        let lock = Lock::shared(catalog.kind, &directory)?;
        let mut control = control.clone();
        let checked = catalog
            .content(&control.id())
            .and_then(|entries| one(catalog, &mut control, &entries));
        lock.release()?;
        checked?;
    }
    if let Some(newest) = chain.first() {
        log.info(&format!("Backup {} WAL segments are valid", newest.id()));
    }
    Ok(())
}

/// The check that a backup makes of itself without `--no-validate`.
pub(super) fn own(
    catalog: &Catalog,
    control: &mut Control,
    entries: &[Entry],
) -> Result<(), Failure> {
    one(catalog, control, entries)
}

/// One backup; its status is written, by gs_probackup even if it is what it was.
fn one(catalog: &Catalog, control: &mut Control, entries: &[Entry]) -> Result<(), Failure> {
    let log = catalog.log;
    let id = control.id();
    let directory = catalog.backup(&id);
    if !matches!(control.status.as_str(), "OK" | "DONE" | "CORRUPT") {
        return Err(Failure::new(format!(
            "Backup {id} has status {}, it cannot be validated",
            control.status
        )));
    }
    let again = control.status == "CORRUPT";
    if again {
        log.warning(&format!("Backup {id} has status: CORRUPT"));
    }
    log.info(&format!(
        "{} backup {id}",
        if again { "Revalidating" } else { "Validating" }
    ));
    let mut good = true;
    for entry in entries.iter().filter(|entry| !entry.is_directory()) {
        match file(catalog.kind, control, entry, &directory)? {
            Found::Good => {}
            Found::Bad { words, counts } => {
                log.warning(&words);
                good &= !counts;
            }
        }
    }
    let status = if good { "OK" } else { "CORRUPT" };
    if control.status != status || catalog.kind == Kind::Gs {
        status.clone_into(&mut control.status);
        catalog.write_control(control)?;
    }
    if good {
        log.info(&format!("Backup {id} data files are valid"));
        return Ok(());
    }
    log.warning(&format!("Backup {id} data files are corrupted"));
    Err(Failure::new(format!("Backup {id} is corrupt.")))
}

fn file(kind: Kind, control: &Control, entry: &Entry, directory: &Path) -> Result<Found, Failure> {
    let path = place(directory, entry);
    let bad = |words: String| {
        Ok(Found::Bad {
            words,
            counts: true,
        })
    };
    if entry.size == UNCHANGED && control.mode == "FULL" {
        return bad(format!(
            "Backup file \"{}\" has invalid size. Possible metadata corruption.",
            entry.path
        ));
    }
    if entry.size <= 0 {
        return Ok(Found::Good);
    }
    let Ok(facts) = std::fs::metadata(&path) else {
        return bad(format!("Backup file \"{}\" is not found", path.display()));
    };
    if i64::try_from(facts.len()) != Ok(entry.size) {
        return bad(format!(
            "Invalid size of backup file \"{}\" : {}. Expected {}",
            path.display(),
            facts.len(),
            entry.size
        ));
    }
    if entry.is_data {
        return data_file(control, entry, &path, directory);
    }
    let bytes = read_whole(&path, STDIO)?.unwrap_or_default();
    let is_control = entry.path == PG_CONTROL && entry.external == 0;
    let crc = if is_control {
        control_crc(&bytes).unwrap_or_default()
    } else {
        crc32c::crc32c(&bytes)
    };
    if crc == entry.crc {
        return Ok(Found::Good);
    }
    Ok(Found::Bad {
        words: format!(
            "Invalid CRC of backup file \"{}\" : {crc:X}. Expected {:X}",
            path.display(),
            entry.crc
        ),
        // gs_probackup has it commented out: the backup stays OK.
        counts: kind == Kind::Pg,
    })
}

fn data_file(
    control: &Control,
    entry: &Entry,
    path: &Path,
    directory: &Path,
) -> Result<Found, Failure> {
    let mut file = In::existing(path, PAGE)?;
    let headers = entry
        .headers
        .ok_or_else(|| Failure::new("no page headers"))
        .and_then(|headers| header_map::read(&directory.join("page_header_map"), headers));
    let headers = match headers {
        Ok(headers) => headers,
        Err(e) => {
            return Ok(Found::Bad {
                words: e.to_string(),
                counts: true,
            });
        }
    };
    let (mut crc, mut wrong) = (0, HashMap::new());
    let mut record = [0; 8 + PAGE];
    for pair in headers.windows(2) {
        let [header, next] = pair else { continue };
        if let Err(e) = read_page(&mut file, header, next, &mut record, path) {
            return Ok(Found::Bad {
                words: e.to_string(),
                counts: true,
            });
        }
        crc = crc32c::crc32c_append(crc, &record);
        let page: &Page = record[8..].first_chunk().expect("a page");
        let number = entry.segment * SEGMENT_BLOCKS + header.block;
        if let (true, PageCheck::Bad { computed, .. }) =
            (control.checksums != 0, page::check(page, number))
        {
            wrong.insert(header.block, computed);
        }
    }
    let mut words: Vec<_> = wrong
        .iter()
        .map(|(block, checksum)| {
            format!(
                "File: {} blknum {block} have wrong checksum: {checksum}",
                entry.path
            )
        })
        .collect();
    if crc != entry.crc {
        words.push(format!(
            "Invalid CRC of backup file \"{}\": {crc:X}. Expected {:X}",
            path.display(),
            entry.crc
        ));
    }
    if words.is_empty() {
        return Ok(Found::Good);
    }
    Ok(Found::Bad {
        words: words.join("\nWARNING: "),
        counts: true,
    })
}
