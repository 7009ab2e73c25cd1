//! `restore`: the chain's pages and files into an empty directory.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::args::Args;
use super::calls::{In, STDIO, read_whole};
use super::catalog::Catalog;
use super::chain;
use super::content::{Entry, UNCHANGED};
use super::control::{Control, time};
use super::faults::Faults;
use super::header_map::{self, PageHeader};
use super::locks::Lock;
use super::log::pretty;
use super::transfer::{PG_CONTROL, place};
use super::{Failure, Kind, validate};

const PAGE: usize = 8192;

/// One backup of the chain.
struct Link {
    directory: PathBuf,
    entries: HashMap<(String, u32), Entry>,
}

/// A chain that is being restored.
struct Restore<'a> {
    catalog: &'a Catalog,
    faults: &'a Faults,
    to: PathBuf,
    /// The backup asked for first, its FULL last.
    chain: Vec<Link>,
    /// Where external directories go.
    external: Vec<PathBuf>,
}

/// `restore`.
pub(super) fn run(catalog: &Catalog, args: &Args, faults: &Faults) -> Result<(), Failure> {
    let log = catalog.log;
    let kind = catalog.kind;
    if kind == Kind::Gs && !args.tablespace_mapping.is_empty() && args.external_mapping.is_empty() {
        return Err(Failure::new(
            "If specify --tablespace-mapping option, you must specify --external-mapping option together",
        ));
    }
    let configuration = catalog.configuration()?;
    let to = args.data.clone().unwrap_or(configuration.data);
    if fs::read_dir(&to).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::new(format!(
            "Restore destination is not empty: \"{}\"",
            to.display()
        )));
    }
    log.log("Restore begin.");
    let all = catalog.list()?;
    let wanted = match &args.backup_id {
        Some(id) => all.iter().find(|control| control.id() == *id),
        None => all.iter().find(|control| control.is_good()),
    };
    let wanted = wanted.ok_or_else(|| {
        let id = args.backup_id.clone().unwrap_or_default();
        Failure::new(format!("Requested backup {id} is not found."))
    })?;
    let controls = chain::of(&all, wanted)?;
    let entries = catalog.content(&wanted.id())?;
    let tablespaces = tablespaces(catalog, wanted, args)?;
    let external = external_places(wanted, args)?;
    if args.no_validate {
        log.warning(&format!(
            "Backup {} is used without validation.",
            wanted.id()
        ));
    } else {
        validate::chain(catalog, &controls, faults)?;
    }
    match kind {
        Kind::Gs => log.info(&format!(
            "Restoring the database from backup at {}",
            time(wanted.start)
        )),
        Kind::Pg => log.info(&format!(
            "Restoring the database from backup {}",
            wanted.id()
        )),
    }
    let mut locks = Vec::new();
    let mut links = Vec::new();
    for control in controls.iter().rev() {
        if !control.is_good() {
            return Err(Failure::new(format!(
                "Backup {} cannot be restored because it is not valid",
                control.id()
            )));
        }
        let directory = catalog.backup(&control.id());
        locks.push(Lock::shared(kind, &directory)?);
        let entries = if control.id() == wanted.id() {
            entries.clone()
        } else {
            catalog.content(&control.id())?
        };
        let keyed = entries
            .into_iter()
            .map(|entry| ((entry.path.clone(), entry.external), entry));
        links.insert(
            0,
            Link {
                directory,
                entries: keyed.collect(),
            },
        );
    }
    let restore = Restore {
        catalog,
        faults,
        to,
        chain: links,
        external,
    };
    let restored = restore.make(entries, &tablespaces, args);
    for lock in locks {
        lock.release()?;
    }
    let bytes = restored?;
    log.info(&format!(
        "Restore incremental ratio (less is better): 100% ({0}/{0})",
        pretty(bytes)
    ));
    if args.no_sync {
        log.warning("Restored files are not synced to disk");
    } else {
        log.info("Syncing restored files to disk");
        rustix::fs::sync();
        log.info("Restored backup files are synced, time elapsed: 0");
    }
    log.info(&format!("Restore of backup {} completed.", wanted.id()));
    Ok(())
}

/// Tablespaces of a backup, by number: where they go.
fn tablespaces(
    catalog: &Catalog,
    wanted: &Control,
    args: &Args,
) -> Result<HashMap<String, PathBuf>, Failure> {
    let path = catalog.backup(&wanted.id()).join("database/tablespace_map");
    let Some(bytes) = read_whole(&path, STDIO)? else {
        catalog.log.log("there is no file tablespace_map");
        return Ok(HashMap::new());
    };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let mut found = HashMap::new();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    for (number, place) in lines {
        found.insert(number.to_owned(), PathBuf::from(place));
    }
    for (from, _) in &args.tablespace_mapping {
        if !found.values().any(|place| place == from) {
            return Err(Failure::new(format!(
                "--tablespace-mapping option's old directory doesn't have an entry in tablespace_map file: \"{}\"",
                from.display()
            )));
        }
    }
    for place in found.values_mut() {
        if let Some((_, to)) = args
            .tablespace_mapping
            .iter()
            .find(|(from, _)| from == place)
        {
            place.clone_from(to);
        }
        if fs::read_dir(&*place).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Failure::new(format!(
                "Restore tablespace destination is not empty: \"{}\"",
                place.display()
            )));
        }
    }
    Ok(found)
}

fn external_places(wanted: &Control, args: &Args) -> Result<Vec<PathBuf>, Failure> {
    for (from, _) in &args.external_mapping {
        if !wanted.external.contains(from) {
            return Err(Failure::new(format!(
                "--external-mapping option's old directory doesn't have an entry in list of external directories of current backup: \"{}\"",
                from.display()
            )));
        }
    }
    let place = |original: &PathBuf| {
        let mapped = args
            .external_mapping
            .iter()
            .find(|(from, _)| from == original);
        mapped.map_or_else(|| original.clone(), |(_, to)| to.clone())
    };
    Ok(wanted.external.iter().map(place).collect())
}

fn make_all(path: &Path, mode: u32) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|e| Failure::call("create directory", path, e))?;
    fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))
        .map_err(|e| Failure::call("change mode of", path, e))
}

impl Restore<'_> {
    fn destination(&self, entry: &Entry) -> PathBuf {
        match entry.external {
            0 => self.to.join(&entry.path),
            number => {
                let at = usize::try_from(number - 1).unwrap_or(usize::MAX);
                let root = self.external.get(at).unwrap_or(&self.to);
                root.join(&entry.path)
            }
        }
    }

    /// All of it; the bytes that were asked for.
    fn make(
        &self,
        mut entries: Vec<Entry>,
        tablespaces: &HashMap<String, PathBuf>,
        args: &Args,
    ) -> Result<u64, Failure> {
        let log = self.catalog.log;
        entries.sort_by(|a, b| (&a.path, a.external).cmp(&(&b.path, b.external)));
        log.log(&format!(
            "Restore directories and symlinks... in {}",
            self.to.display()
        ));
        make_all(&self.to, 0o700)?;
        self.make_directories(&entries, tablespaces)?;
        let bytes = entries
            .iter()
            .map(|entry| u64::try_from(entry.size).unwrap_or(0).max(entry.full_size))
            .sum();
        log.info(&format!(
            "Start restoring backup files. PGDATA size: {}",
            pretty(bytes)
        ));
        self.faults.reach("restoring", log)?;
        let begun = Instant::now();
        let left_out = HashSet::from(["tablespace_map", "database_map", PG_CONTROL]);
        let files: Vec<&Entry> = entries
            .iter()
            .filter(|entry| !entry.is_directory())
            .filter(|entry| entry.external != 0 || !left_out.contains(entry.path.as_str()))
            .collect();
        self.files(&files, args.threads)?;
        // pg_control last: without it nothing starts on half a directory.
        let control = entries
            .iter()
            .find(|entry| entry.path == PG_CONTROL && entry.external == 0)
            .ok_or_else(|| Failure::new("File \"global/pg_control\" not found in backup"))?;
        self.file(control)?;
        log.info(&format!(
            "Backup files are restored. Transfered bytes: {}, time elapsed: {}s",
            pretty(bytes),
            begun.elapsed().as_secs()
        ));
        Ok(bytes)
    }

    fn make_directories(
        &self,
        entries: &[Entry],
        tablespaces: &HashMap<String, PathBuf>,
    ) -> Result<(), Failure> {
        let log = self.catalog.log;
        for root in &self.external {
            make_all(root, 0o700)?;
        }
        for entry in entries.iter().filter(|entry| entry.is_directory()) {
            let to = self.destination(entry);
            let number = entry.path.strip_prefix("pg_tblspc/");
            let place = number
                .filter(|_| entry.external == 0)
                .and_then(|number| tablespaces.get(number));
            if let Some(place) = place {
                log.log(&format!(
                    "Create directory \"{}\" and symbolic link \"{}\"",
                    place.display(),
                    to.display()
                ));
                make_all(place, 0o700)?;
                symlink(place, &to).map_err(|e| Failure::call("create symbolic link", &to, e))?;
                continue;
            }
            make_all(&to, entry.mode)?;
        }
        Ok(())
    }

    fn files(&self, files: &[&Entry], threads: usize) -> Result<(), Failure> {
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        let work = |number: usize| {
            self.catalog.log.log(&format!("Start thread {number}"));
            while let Some(entry) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                let done = self.faults.before_file().and_then(|()| self.file(entry));
                let mut failed = failed.lock().expect("no panic under it");
                if let Err(e) = done {
                    failed.get_or_insert(e);
                }
                if failed.is_some() {
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for number in 1..=threads.max(1) {
                let work = &work;
                scope.spawn(move || work(number));
            }
        });
        failed.into_inner().unwrap_or_default().map_or(Ok(()), Err)
    }

    fn file(&self, entry: &Entry) -> Result<(), Failure> {
        let to = self.destination(entry);
        let out =
            File::create(&to).map_err(|e| Failure::call("open restore target file", &to, e))?;
        if entry.is_data {
            self.pages(entry, &out, &to)?;
        } else {
            self.bytes(entry, &out, &to)?;
        }
        fs::set_permissions(&to, Permissions::from_mode(entry.mode & 0o7777))
            .map_err(|e| Failure::call("change mode of", &to, e))
    }

    /// A file that is not stored by pages lies whole in the newest backup that has it.
    fn bytes(&self, entry: &Entry, out: &File, to: &Path) -> Result<(), Failure> {
        let key = (entry.path.clone(), entry.external);
        let found = self.chain.iter().find_map(|link| {
            let entry = link.entries.get(&key)?;
            (entry.size != UNCHANGED).then_some((link, entry))
        });
        let (link, stored) = found.ok_or_else(|| {
            Failure::new(format!(
                "Failed to locate a full copy of file \"{}\" in the chain",
                entry.path
            ))
        })?;
        if stored.size == 0 {
            return Ok(());
        }
        let path = place(&link.directory, stored);
        let mut file = In::existing(&path, STDIO)?;
        let mut buffer = vec![0; STDIO];
        let mut at = 0;
        loop {
            let got = file.read(&mut buffer)?;
            out.write_all_at(&buffer[..got], at)
                .map_err(|e| Failure::call("write to file", to, e))?;
            at += got as u64;
            if got < buffer.len() {
                break;
            }
        }
        if i64::try_from(at) != Ok(stored.size) {
            return Err(Failure::new(format!(
                "Backup file \"{}\" has {at} bytes, {} are listed",
                path.display(),
                stored.size
            )));
        }
        Ok(())
    }

    /// The pages of a file: of a chain the newest backup first, each block once; of a FULL as they come.
    fn pages(&self, entry: &Entry, out: &File, to: &Path) -> Result<(), Failure> {
        let key = (entry.path.clone(), entry.external);
        let mut restored = HashSet::new();
        for link in &self.chain {
            let Some(stored) = link.entries.get(&key).filter(|stored| stored.size > 0) else {
                continue;
            };
            self.pages_of(link, stored, entry.blocks, &mut restored, out, to)?;
        }
        let length = u64::from(entry.blocks) * PAGE as u64;
        out.set_len(length)
            .map_err(|e| Failure::call("truncate file", to, e))
    }

    fn pages_of(
        &self,
        link: &Link,
        stored: &Entry,
        blocks: u32,
        restored: &mut HashSet<u32>,
        out: &File,
        to: &Path,
    ) -> Result<(), Failure> {
        let path = place(&link.directory, stored);
        let mut file = In::existing(&path, STDIO)?;
        let headers = stored.headers.ok_or_else(|| {
            Failure::new(format!(
                "Failed to get page headers for file \"{}\"",
                path.display()
            ))
        })?;
        let headers = header_map::read(&link.directory.join("page_header_map"), headers)?;
        let several = self.chain.len() > 1;
        let mut position = 0;
        let mut record = [0; 8 + PAGE];
        for pair in headers.windows(2) {
            let [header, next] = pair else { continue };
            if header.block >= blocks {
                break;
            }
            if several && !restored.insert(header.block) {
                continue;
            }
            if header.position != position {
                file.seek(u64::from(header.position))?;
            }
            read_page(&mut file, header, next, &mut record, &path)?;
            position = next.position;
            out.write_all_at(&record[8..], u64::from(header.block) * PAGE as u64)
                .map_err(|e| Failure::call("write to file", to, e))?;
        }
        Ok(())
    }
}

/// Reads one page's record and holds it against its header.
pub(super) fn read_page(
    file: &mut In,
    header: &PageHeader,
    next: &PageHeader,
    record: &mut [u8; 8 + PAGE],
    path: &Path,
) -> Result<(), Failure> {
    let bad = |what: &str| {
        Failure::new(format!(
            "Cannot read block {} of \"{}\": {what}",
            header.block,
            path.display()
        ))
    };
    if next.position.checked_sub(header.position) != u32::try_from(record.len()).ok() {
        return Err(bad("the stand-in reads no compressed pages"));
    }
    if file.read(record)? != record.len() {
        return Err(bad("cut short"));
    }
    if record[..4] != header.block.to_le_bytes() {
        return Err(bad("another block is stored there"));
    }
    Ok(())
}
