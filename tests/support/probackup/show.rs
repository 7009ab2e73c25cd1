//! `show` and `delete`.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::backup::Release;
use super::calls;
use super::catalog::Catalog;
use super::chain;
use super::control::{Control, time};
use super::locks::Lock;
use super::log::pretty;
use super::{Failure, Kind};

fn print(text: &str) -> Result<(), Failure> {
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| Failure::call("write to", Path::new("standard output"), e))
}

/// `show`: a table, one backup's control file, or JSON.
pub(super) fn show(catalog: &Catalog, id: Option<&str>, as_json: bool) -> Result<(), Failure> {
    let mut all = catalog.list()?;
    if let Some(id) = id {
        all.retain(|control| control.id() == id);
        if all.is_empty() {
            let text = format!("Requested backup \"{id}\" is not found.");
            return match catalog.kind {
                Kind::Gs => {
                    catalog.log.info(&text);
                    Ok(())
                }
                Kind::Pg => Err(Failure::new(text)),
            };
        }
        if !as_json {
            return print(&all[0].text(catalog.kind));
        }
    }
    if as_json {
        return print_json(catalog, &all);
    }
    let mut text = format!("\nBACKUP INSTANCE '{}'\n", catalog.instance());
    text += " Instance  Version  ID  Recovery Time  Mode  WAL Mode  TLI  Data  WAL  Start LSN  Stop LSN  Status \n";
    for control in &all {
        text += &format!(
            " {}  {}  {}  {}  {}  STREAM  {}/0  {}  {}  {}  {}  {} \n",
            catalog.instance(),
            control.server_version,
            control.id(),
            control.recovery_time.map_or("----".to_owned(), time),
            control.mode,
            control.timeline,
            pretty(control.data_bytes.unwrap_or(0)),
            pretty(control.wal_bytes.unwrap_or(0)),
            control.start_lsn,
            control.stop_lsn,
            control.status
        );
    }
    print(&text)
}

fn print_json(catalog: &Catalog, all: &[Control]) -> Result<(), Failure> {
    let parent_tli = |control: &Control| {
        let parent = control.parent.as_ref()?;
        let found = all.iter().find(|other| other.id() == *parent)?;
        Some(found.timeline)
    };
    let backups: Vec<Value> = all
        .iter()
        .map(|control| backup(control, parent_tli(control).unwrap_or(0)))
        .collect();
    let instances = json!([{ "instance": catalog.instance(), "backups": backups }]);
    let whole = if Release::from_environment(catalog.kind).newer {
        json!({ "backup_info": instances })
    } else {
        instances
    };
    let text =
        serde_json::to_string_pretty(&whole).map_err(|e| Failure::new(format!("JSON: {e}")))?;
    print(&(text + "\n"))
}

fn backup(control: &Control, parent_tli: u32) -> Value {
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| {
        fields.insert(name.to_owned(), value);
    };
    put("id", control.id().into());
    if let Some(parent) = &control.parent {
        put("parent-backup-id", parent.clone().into());
    }
    put("backup-mode", control.mode.clone().into());
    put("wal", "STREAM".into());
    put("compress-alg", control.compress.clone().into());
    put("compress-level", control.compress_level.into());
    put("from-replica", control.from_replica.to_string().into());
    put("block-size", 8192.into());
    put("xlog-block-size", 8192.into());
    put("checksum-version", control.checksums.into());
    put("program-version", control.program_version.clone().into());
    put("server-version", control.server_version.clone().into());
    put("current-tli", control.timeline.into());
    put("parent-tli", parent_tli.into());
    put("start-lsn", control.start_lsn.to_string().into());
    put("stop-lsn", control.stop_lsn.to_string().into());
    put("start-time", time(control.start).into());
    if let Some(end) = control.end {
        put("end-time", time(end).into());
    }
    put("recovery-xid", control.recovery_xid.into());
    if let Some(at) = control.recovery_time {
        put("recovery-time", time(at).into());
    }
    if let Some(name) = &control.recovery_name {
        put("recovery-name", name.clone().into());
    }
    if let Some(bytes) = control.data_bytes {
        put("data-bytes", bytes.into());
    }
    if let Some(bytes) = control.wal_bytes {
        put("wal-bytes", bytes.into());
    }
    put("uncompressed-bytes", control.uncompressed_bytes.into());
    put("pgdata-bytes", control.pgdata_bytes.into());
    if !control.external.is_empty() {
        let all: Vec<_> = control
            .external
            .iter()
            .map(|p| p.to_string_lossy())
            .collect();
        put("external-dirs", all.join(":").into());
    }
    put("status", control.status.clone().into());
    if control.content_crc != 0 {
        put("content-crc", control.content_crc.into());
    }
    Value::Object(fields)
}

/// `delete`: a backup and, unasked, all that stand on it.
pub(super) fn delete(catalog: &Catalog, id: &str) -> Result<(), Failure> {
    let log = catalog.log;
    catalog.configuration()?;
    let all = catalog.list()?;
    let target = all.iter().find(|control| control.id() == id);
    let target =
        target.ok_or_else(|| Failure::new(format!("Failed to find backup {id}, cannot delete")))?;
    log.log(&format!("Backups based on {id} will be deleted"));
    let doomed = chain::with_children(&all, target);
    let bytes = doomed
        .iter()
        .map(|control| control.data_bytes.unwrap_or(0) + control.wal_bytes.unwrap_or(0));
    log.info(&format!(
        "Resident data size to free by delete of backup {id} : {}",
        pretty(bytes.sum())
    ));
    for control in doomed.iter().rev() {
        let directory = catalog.backup(&control.id());
        let _lock = Lock::exclusive(catalog.kind, &directory)?;
        log.info(&format!(
            "Delete: {} {}",
            control.id(),
            time(control.recovery_time.unwrap_or(control.start))
        ));
        let mut control = control.clone();
        "DELETING".clone_into(&mut control.status);
        catalog.write_control(&control)?;
        // The lock's file goes with the rest.
        remove(&directory)?;
    }
    Ok(())
}

/// Leaf by leaf, the directory last.
fn remove(directory: &Path) -> Result<(), Failure> {
    let entries =
        fs::read_dir(directory).map_err(|e| Failure::call("open directory", directory, e))?;
    let mut paths: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    for path in paths.iter().rev() {
        if fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir()) {
            remove(path)?;
        } else {
            calls::unlink(path)?;
        }
    }
    fs::remove_dir(directory).map_err(|e| Failure::call("remove directory", directory, e))
}
