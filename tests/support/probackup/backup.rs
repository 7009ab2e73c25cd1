//! `backup`: one backup, step by step, in the order the real programs were seen to take.

mod ending;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_wal::SegmentName;
use tokio::runtime::Runtime;

use super::archive::Archive;
use super::args::Args;
use super::calls;
use super::catalog::{Catalog, read_pg_control};
use super::chain;
use super::content::Entry;
use super::control::{Control, id_of, now, time};
use super::copy::{self, Rules};
use super::faults::{self, Faults};
use super::header_map::HeaderMap;
use super::locks::Lock;
use super::log::pretty;
use super::sql::{Facts, Server, Session};
use super::stream::{Order, Stream};
use super::transfer::{PG_CONTROL, Transfer, place};
use super::walk::{self, Source};
use super::{Failure, Kind};

/// What of a release of gs_probackup differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Release {
    /// It looks whether the catalog has room, prints progress and wraps its JSON: 6.0.2.
    pub(super) newer: bool,
}

impl Release {
    pub(super) fn from_environment(kind: Kind) -> Self {
        let asked = std::env::var("PROBACKUP_STAND_IN_RELEASE");
        Self {
            newer: kind == Kind::Gs && asked.is_ok_and(|release| release.starts_with('6')),
        }
    }
}

/// A backup being made.
struct Backup<'a> {
    args: &'a Args,
    catalog: &'a Catalog,
    faults: &'a Faults,
    release: Release,
    data: PathBuf,
    /// The cluster that add-instance was given.
    system_identifier: u64,
    control: Control,
    directory: PathBuf,
}

/// The server's part of it.
struct Connected {
    server: Server,
    session: Session,
    facts: Facts,
}

/// `backup`.
pub(super) fn run(
    catalog: &Catalog,
    args: &Args,
    faults: &Faults,
    runtime: Arc<Runtime>,
) -> Result<(), Failure> {
    let kind = catalog.kind;
    let log = catalog.log;
    let mode = args.mode.clone().ok_or_else(|| {
        Failure::new("Required parameter not specified: BACKUP_MODE (-b, --backup-mode)")
    })?;
    check_mode(kind, &mode)?;
    if kind == Kind::Pg && !args.stream {
        return Err(Failure::new(
            "the stand-in knows STREAM backups only: give --stream",
        ));
    }
    let configuration = catalog.configuration()?;
    let data = args.data.clone().unwrap_or(configuration.data);
    if kind == Kind::Pg {
        // pg_probackup looks at all backups before it makes one.
        catalog.list()?;
    }
    let release = Release::from_environment(kind);
    let start = begin_directory(catalog, args)?;
    let id = id_of(start);
    let directory = catalog.backup(&id);
    let lock = Lock::exclusive(kind, &directory)?;
    let control = Control {
        start,
        mode: mode.clone(),
        compress: "none".to_owned(),
        compress_level: args.compress_level,
        program_version: kind.version().to_owned(),
        status: "RUNNING".to_owned(),
        external: args.external.clone(),
        checksums: u32::from(read_pg_control(&data)?.data_checksum_version != 0),
        recovery_name: (kind == Kind::Gs).then(String::new),
        ..Control::default()
    };
    let mut backup = Backup {
        args,
        catalog,
        faults,
        release,
        data,
        system_identifier: configuration.system_identifier,
        control,
        directory,
    };
    log.info(&format!(
        "Backup start, {} version: {}, instance: {}, backup ID: {id}, backup mode: {mode}, wal mode: STREAM, \
         remote: false, compress-algorithm: {}, compress-level: {}",
        kind.program(),
        kind.version(),
        catalog.instance(),
        args.compress,
        args.compress_level
    ));
    catalog.write_control(&backup.control)?;
    log.log("Backup destination is initialized");
    if args.compress != "none" {
        log.warning("the stand-in does not compress: pages are stored as they are");
    }
    let result = faults
        .reach("begin", log)
        .and_then(|()| backup.make(runtime));
    if let Err(failure) = &result {
        log.error(&failure.to_string());
        log.warning(&format!(
            "Backup {id} is running, setting its status to ERROR"
        ));
        "ERROR".clone_into(&mut backup.control.status);
        backup.control.end = Some(now());
        // Said if it fails too, as when the disk is full; the first failure is what counts.
        if let Err(e) = catalog.write_control(&backup.control) {
            log.error(&e.to_string());
        }
    }
    let released = lock.release();
    match result {
        Ok(()) => {
            released?;
            log.info(&format!("Backup {id} completed"));
            Ok(())
        }
        // Said already.
        Err(_) => Err(Failure::new("")),
    }
}

fn check_mode(kind: Kind, mode: &str) -> Result<(), Failure> {
    let ptrack = std::env::var_os("PROBACKUP_STAND_IN_PTRACK").is_some();
    match (kind, mode) {
        (_, "FULL") | (Kind::Gs, "PTRACK") | (Kind::Pg, "DELTA" | "PAGE") => Ok(()),
        (Kind::Pg, "PTRACK") if ptrack => Ok(()),
        (Kind::Pg, "PTRACK") => Err(Failure::new(
            "This PostgreSQL instance does not support ptrack",
        )),
        _ => Err(Failure::new(format!("invalid backup-mode \"{mode}\""))),
    }
}

/// Makes the backup's directories; the second the backup begins in.
fn begin_directory(catalog: &Catalog, args: &Args) -> Result<i64, Failure> {
    let mut start = now();
    while !calls::make_new_directory(&catalog.backup(&id_of(start)))? {
        if catalog.kind == Kind::Gs {
            return Err(Failure::new("backup destination is not empty"));
        }
        // pg_probackup takes the next second.
        faults::wait(Duration::from_millis(100))?;
        start = now();
    }
    let directory = catalog.backup(&id_of(start));
    calls::make_directory(&directory.join("database"))?;
    if !args.external.is_empty() {
        let external = directory.join("external_directories");
        calls::make_directory(&external)?;
        for number in 1..=args.external.len() {
            calls::make_directory(&external.join(format!("externaldir{number}")))?;
        }
    }
    Ok(start)
}

impl Backup<'_> {
    fn kind(&self) -> Kind {
        self.catalog.kind
    }

    fn make(&mut self, runtime: Arc<Runtime>) -> Result<(), Failure> {
        let log = self.catalog.log;
        let connected = self.connect(runtime)?;
        log_start(self);
        let label = format!("{} with pg_probackup", time(self.control.start));
        let (start, timeline) = connected
            .session
            .start(self.kind(), &label, &connected.facts)?;
        self.control.start_lsn = start;
        self.control.timeline = timeline;
        if self.is_page() {
            connected.session.switch_wal()?;
        }
        let made = self.copy(&connected);
        match made {
            Ok(()) => Ok(()),
            Err(e) => {
                // Backup mode ends with the session; the real programs end it before they go.
                log.warning("backup in progress, stop backup");
                log.info("wait for pg_stop_backup()");
                if connected.session.stop(&connected.facts).is_ok() {
                    log.info("pg_stop backup() successfully executed");
                }
                Err(e)
            }
        }
    }

    fn connect(&mut self, runtime: Arc<Runtime>) -> Result<Connected, Failure> {
        let log = self.catalog.log;
        let (server, session) = Server::connect(self.kind(), self.args, runtime, log)?;
        let facts = session.facts()?;
        let expected = self.system_identifier;
        if facts.system_identifier != expected {
            return Err(Failure::new(format!(
                "Backup data directory was initialized for system id {expected}, but connected instance system id is {}",
                facts.system_identifier
            )));
        }
        self.control.server_version = (facts.version / 10_000).to_string();
        self.control.from_replica = facts.in_recovery;
        self.control.checksums = u32::from(facts.checksums);
        if self.kind() == Kind::Pg {
            self.control.conninfo = Some(server.conninfo.clone());
        }
        let name = match self.kind() {
            Kind::Gs => "openGauss",
            Kind::Pg => "PostgreSQL",
        };
        if facts.checksums {
            let text = format!(
                "This {name} instance was initialized with data block checksums. Data block corruption will be detected"
            );
            match self.kind() {
                Kind::Gs => log.log(&text),
                Kind::Pg => log.info(&text),
            }
        } else {
            log.warning(&format!(
                "This {name} instance was initialized without data block checksums. {} have no way to detect data block corruption without them. \
                 Reinitialize PGDATA with option '--data-checksums'.",
                self.kind().program()
            ));
        }
        if facts.superuser && self.kind() == Kind::Pg {
            log.warning(
                "Current PostgreSQL role is superuser. It is not recommended to run pg_probackup under superuser.",
            );
        }
        Ok(Connected {
            server,
            session,
            facts,
        })
    }

    /// From backup mode on to backup mode off, and all that comes after.
    fn copy(&mut self, connected: &Connected) -> Result<(), Failure> {
        let log = self.catalog.log;
        self.faults.reach("started", log)?;
        let parent = self.find_parent()?;
        self.catalog.write_control(&self.control)?;
        let archive = self.archive(connected);
        if self.is_page() {
            archive.wait_for(self.control.start_lsn, log)?;
        }
        let stream = self.start_stream(connected)?;
        if self.kind() == Kind::Pg {
            stream.wait_first()?;
        }
        let sources = self.sources(connected)?;
        self.announce(&sources, parent.as_ref());
        self.make_directories(&sources)?;
        let sources = by_size(sources);
        let listed: Vec<Entry> = sources.iter().map(|source| source.entry.clone()).collect();
        self.catalog
            .write_content(&mut self.control, &listed, true)?;
        self.catalog.write_control(&self.control)?;
        stream.wait_first()?;
        if let Some((parent, _)) = parent.as_ref().filter(|_| self.is_page()) {
            archive.read(parent.start_lsn, self.control.start_lsn, log)?;
        }

        let (mut entries, headers) = self.transfer(&sources, parent)?;
        self.faults.reach("copied", log)?;
        let databases = connected.session.databases()?;
        log.info("wait for pg_stop_backup()");
        if faults::interrupted() {
            return Err(Failure::new("interrupted"));
        }
        let stopped = connected.session.stop(&connected.facts)?;
        log.info("pg_stop backup() successfully executed");
        self.faults.reach("stopped", log)?;
        self.control.stop_lsn = stopped.lsn;
        self.control.recovery_xid = stopped.xid;
        self.control.recovery_time = Some(stopped.time);
        if self.kind() == Kind::Gs {
            self.control.recovery_name = Some(format!("backup {}", self.control.id()));
        }
        self.end(connected, &stopped, stream, headers, &mut entries)?;
        self.write_map(&databases, &mut entries)?;
        self.finish(&entries)
    }

    fn is_page(&self) -> bool {
        self.control.mode == "PAGE"
    }

    fn archive(&self, connected: &Connected) -> Archive {
        Archive {
            directory: self.catalog.archive(),
            system_identifier: self.system_identifier,
            size: connected.facts.segment,
            timeline: self.control.timeline,
        }
    }

    /// The backup that this one is an increment of.
    fn find_parent(&mut self) -> Result<Option<(Control, Vec<Entry>)>, Failure> {
        if self.control.mode == "FULL" {
            return Ok(None);
        }
        let log = self.catalog.log;
        let all = self.catalog.list()?;
        let parent = chain::parent_for(&all, &self.control);
        let Some(parent) = parent else {
            log.warning(&format!(
                "Valid backup on current timeline {} is not found, trying to look up on previous timelines",
                self.control.timeline
            ));
            log.warning(
                "Cannot find valid backup on previous timelines, WAL archive is not available",
            );
            return Err(Failure::new(
                "Create new full backup before an incremental one",
            ));
        };
        if let Some(full) = chain::of(&all, parent)
            .ok()
            .and_then(|chain| chain.last().cloned())
        {
            log.log(&format!("Latest valid FULL backup: {}", full.id()));
        }
        log.info(&format!("Parent backup: {}", parent.id()));
        let entries = self.catalog.content(&parent.id())?;
        self.control.parent = Some(parent.id());
        self.catalog.write_control(&self.control)?;
        Ok(Some((parent.clone(), entries)))
    }

    fn start_stream(&self, connected: &Connected) -> Result<Stream, Failure> {
        let to = self.directory.join("database/pg_wal");
        calls::make_directory(&to)?;
        if self.kind() == Kind::Pg {
            let size = connected.facts.segment;
            let first = SegmentName::of_lsn(self.control.timeline, self.control.start_lsn, size);
            self.catalog.log.info(&format!(
                "Wait for WAL segment {}/{} to be streamed",
                to.display(),
                first.format(size)
            ));
        }
        let order = Order {
            kind: self.kind(),
            log: self.catalog.log,
            faults: self.faults.clone(),
            from: self.data.join("pg_wal"),
            to,
            timeline: self.control.timeline,
            size: connected.facts.segment,
            start: self.control.start_lsn,
            slot: self.args.temporary_slot,
        };
        Ok(Stream::start(order, connected.server.session()?))
    }

    /// All that is to be copied, by path.
    fn sources(&mut self, connected: &Connected) -> Result<Vec<Source>, Failure> {
        let cluster = read_pg_control(&self.data)?;
        let tablespace = format!(
            "PG_{}_{}",
            connected.facts.version / 10_000,
            cluster.catalog_version
        );
        let mut sources = walk::data_directory(self.kind(), &self.data, &tablespace)?;
        for (number, directory) in (1..).zip(&self.args.external) {
            sources.extend(walk::external(directory, number)?);
        }
        sources.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
        let counted = |source: &Source| {
            if source.entry.is_directory() {
                4096
            } else {
                source.bytes
            }
        };
        let own = sources.iter().filter(|source| source.entry.external == 0);
        self.control.pgdata_bytes = own.map(counted).sum();
        if self.release.newer {
            self.check_room(sources.iter().map(counted).sum())?;
        }
        Ok(sources)
    }

    /// gs_probackup 6.0.2 looks at the room before it copies.
    fn check_room(&self, bytes: u64) -> Result<(), Failure> {
        let room = rustix::fs::statfs(&self.directory)
            .map_err(|e| Failure::call("statfs", &self.directory, e))?;
        let block = u64::try_from(room.f_bsize).unwrap_or(0);
        if room.f_bavail.saturating_mul(block) <= bytes {
            return Err(Failure::new(format!(
                "There is not enough remaining disk space for the backup: {bytes} bytes are needed, {} are free",
                room.f_bavail.saturating_mul(block)
            )));
        }
        Ok(())
    }

    fn announce(&self, sources: &[Source], parent: Option<&(Control, Vec<Entry>)>) {
        let log = self.catalog.log;
        log.info(&format!(
            "PGDATA size: {}",
            pretty(self.control.pgdata_bytes)
        ));
        let start = self.control.start_lsn;
        match (self.kind(), parent) {
            (Kind::Pg, parent) => {
                let timeline = self.control.timeline;
                log.info(&format!("Current Start LSN: {start}, TLI: {timeline}"));
                if let Some((parent, _)) = parent {
                    log.info(&format!(
                        "Parent Start LSN: {}, TLI: {}",
                        parent.start_lsn, parent.timeline
                    ));
                }
            }
            (Kind::Gs, Some((parent, _))) => {
                log.log(&format!("Current tli: {}", self.control.timeline));
                log.log(&format!("Parent start_lsn: {}", parent.start_lsn));
                log.log(&format!("start_lsn: {start}"));
                log.info("Extracting pagemap of changed blocks");
                log.info(&format!(
                    "change bitmap start lsn location is {}",
                    parent.start_lsn
                ));
                log.info(&format!("change bitmap end lsn location is {start}"));
                log.info("Pagemap successfully extracted, time elapsed: 0 sec");
            }
            (Kind::Gs, None) => {}
        }
        log.log(&format!("{} files and directories to copy", sources.len()));
    }

    fn make_directories(&self, sources: &[Source]) -> Result<(), Failure> {
        for source in sources.iter().filter(|source| source.entry.is_directory()) {
            calls::make_directory(&place(&self.directory, &source.entry))?;
        }
        Ok(())
    }

    fn transfer(
        &mut self,
        sources: &[Source],
        parent: Option<(Control, Vec<Entry>)>,
    ) -> Result<(Vec<Entry>, HeaderMap), Failure> {
        let log = self.catalog.log;
        let begun = Instant::now();
        log.info("Start transferring data files");
        let rules = Rules {
            kind: self.kind(),
            checksums: self.control.checksums != 0,
            parent_start: parent.as_ref().map(|(parent, _)| parent.start_lsn),
            parent_time: parent.as_ref().map_or(0, |(parent, _)| parent.start),
            forget: false,
        };
        let by_path = |entries: Vec<Entry>| {
            let keyed = entries
                .into_iter()
                .map(|entry| ((entry.path.clone(), entry.external), entry));
            keyed.collect::<HashMap<_, _>>()
        };
        let directory = self.directory.clone();
        let transfer = Transfer {
            kind: self.kind(),
            log,
            faults: self.faults,
            backup: &directory,
            sources,
            parent: parent.map(|(_, entries)| by_path(entries)),
            rules,
            threads: self.args.threads,
            progress: self.release.newer,
        };
        let (catalog, control) = (self.catalog, &mut self.control);
        let mut rewrite = |entries: &[Entry]| {
            catalog.write_content(control, entries, false)?;
            catalog.write_control(control)
        };
        let (mut entries, headers) = transfer
            .run(&mut rewrite)
            .inspect_err(|_| log.error("Data files transferring failed"))?;
        if self.kind() == Kind::Pg {
            let source = sources
                .iter()
                .find(|source| source.entry.path == PG_CONTROL && source.entry.external == 0);
            let source = source.ok_or_else(|| Failure::new("no global/pg_control"))?;
            let to = place(&self.directory, &source.entry);
            entries.push(copy::pg_control(
                source,
                &to,
                self.faults.forgets(PG_CONTROL),
            )?);
        }
        log.info(&format!(
            "Data files are transferred, time elapsed: {}s",
            begun.elapsed().as_secs()
        ));
        Ok((entries, headers))
    }
}

fn log_start(backup: &Backup<'_>) {
    match backup.kind() {
        Kind::Gs => backup.catalog.log.log("Database backup start"),
        Kind::Pg => {
            backup.catalog.log.info("Database backup start");
            backup.catalog.log.info("wait for pg_backup_start()");
        }
    }
}

/// The smallest first, as both programs copy.
fn by_size(mut sources: Vec<Source>) -> Vec<Source> {
    sources.sort_by_key(|source| source.bytes);
    sources
}
