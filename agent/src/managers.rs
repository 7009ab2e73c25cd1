//! What starts or moves the database by itself, and would fight a restore over it.
//!
//! Found from the outside: the postmaster's ancestors and its cgroup in `/proc`, other programs of this host and
//! their configuration. A cluster manager of another database on the same host is told apart where that can be
//! seen; where it cannot, it counts.

use std::collections::HashMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::Manager;
use tokio::time::timeout;

use crate::child;
use crate::config::Config;

/// `systemctl`'s time to say how a unit is restarted.
const SYSTEMCTL: Duration = Duration::from_secs(3);
/// Most bytes read of a manager's configuration.
const CONFIG_LIMIT: u64 = 1 << 20;
/// Ancestors looked at; more is a circle of a process table that changed meanwhile.
const ANCESTORS: usize = 16;

/// A program that manages databases.
struct Known {
    /// Its name in messages.
    name: &'static str,
    /// Base names of its program, or of the script that an interpreter runs.
    programs: &'static [&'static str],
    /// File in the data directory of a database that it manages.
    file: Option<&'static str>,
    /// What to do about it.
    next: &'static str,
}

const KNOWN: [Known; 8] = [
    Known {
        name: "patroni",
        programs: &["patroni"],
        file: Some("patroni.dynamic.json"),
        next: "patronictl pause, then stop Patroni on every node of this shard (systemctl stop patroni); \
               start it when the restore has ended",
    },
    Known {
        name: "repmgrd",
        programs: &["repmgrd"],
        file: None,
        next: "repmgr service pause, then stop repmgrd on every node of this shard",
    },
    Known {
        name: "pg_auto_failover",
        programs: &["pg_autoctl"],
        file: None,
        next: "pg_autoctl enable maintenance, then stop pg_autoctl on every node of this shard",
    },
    Known {
        name: "stolon",
        programs: &["stolon-keeper"],
        file: None,
        next: "stop stolon-keeper and stolon-sentinel of this shard",
    },
    Known {
        name: "openGauss CM",
        programs: &["cm_agent", "cm_server", "om_monitor"],
        file: None,
        next: "cm_ctl stop (or stop om_monitor and cm_agent on this node), and start the database by itself",
    },
    Known {
        name: "pacemaker",
        programs: &["pacemakerd", "pacemaker-execd"],
        file: None,
        next: "pcs property set maintenance-mode=true",
    },
    Known {
        name: "CloudNativePG",
        programs: &["manager"],
        file: None,
        next: "restore into a cluster that the operator does not manage",
    },
    Known {
        name: "supervisor",
        programs: &["supervisord", "runsv", "s6-supervise", "monit"],
        file: None,
        next: "tell it to leave the database alone (supervisorctl stop, sv down, s6-svc -d, monit unmonitor), \
               and start the database by itself",
    },
];

/// Supervisors and operators run many things: only as an ancestor of the postmaster do they count.
const ONLY_AS_ANCESTOR: [&str; 3] = ["CloudNativePG", "supervisor", "pacemaker"];

/// Everything that manages the database in `pgdata`. What cannot be read is left out.
pub async fn find(config: &Config, pgdata: Option<PathBuf>) -> Vec<Manager> {
    let Some(pgdata) = pgdata else {
        return Vec::new();
    };
    // Reading a process table is files by the hundred.
    let look = tokio::task::spawn_blocking(move || {
        let processes = Processes::read(Path::new("/proc"));
        let found = processes.managers(&pgdata);
        let unit = processes.unit(&pgdata);
        (found, unit)
    });
    let Ok((mut found, unit)) = look.await else {
        return Vec::new();
    };
    let told = config.start_command.is_some() && config.stop_command.is_some();
    if let Some(unit) = unit
        && !told
        && let Some(restart) = restart_of(&unit).await
        && ["always", "on-success"].contains(&restart.as_str())
    {
        found.push(Manager {
            name: "systemd".to_owned(),
            evidence: format!("the postmaster runs in the unit {unit}, which has Restart={restart}"),
            next: format!(
                "give the agent --stop-command 'systemctl stop {unit}' and --start-command 'systemctl start \
                 {unit}' (with sudo where it needs that), or set Restart=on-failure in the unit"
            ),
        });
    }
    found
}

/// How systemd restarts a unit; `None` if there is no systemd to ask.
async fn restart_of(unit: &str) -> Option<String> {
    let asked = child::command("systemctl")
        .args(["show", "--property=Restart", "--value", "--", unit])
        .output();
    let output = timeout(SYSTEMCTL, asked).await.ok()?.ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| output.status.success() && !text.is_empty())
}

/// One process.
#[derive(Debug, Clone, Default)]
struct Process {
    parent: u32,
    argv: Vec<String>,
}

impl Process {
    /// The program's name: of the script, where an interpreter runs one.
    fn runs(&self, programs: &[&str]) -> Option<&str> {
        let base = |arg: &'_ String| arg.rsplit('/').next().unwrap_or_default().to_owned();
        let interpreter = |name: &str| {
            ["python", "sh", "bash", "perl"].iter().any(|known| {
                name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.') == *known
            })
        };
        let first = self.argv.first().map(base)?;
        let named = |name: &str| programs.contains(&name);
        if named(&first) {
            return self.argv.first().map(String::as_str);
        }
        let second = self.argv.get(1)?;
        (interpreter(&first) && named(&base(second))).then_some(second.as_str())
    }
}

/// The process table.
#[derive(Debug)]
struct Processes {
    root: PathBuf,
    all: HashMap<u32, Process>,
}

/// Whether a manager is of this database.
enum Mine {
    Yes(String),
    No,
    Unknown(String),
}

impl Processes {
    fn read(root: &Path) -> Self {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let all = pids.filter_map(|pid| Some((pid, process(root, pid)?)));
        Self {
            root: root.to_owned(),
            all: all.collect(),
        }
    }

    /// The postmaster and what started it, the nearest first.
    fn ancestry(&self, postmaster: u32) -> Vec<u32> {
        let mut line = Vec::new();
        let mut next = postmaster;
        while let Some(process) = self.all.get(&next)
            && line.len() < ANCESTORS
        {
            line.push(next);
            next = process.parent;
        }
        line
    }

    fn managers(&self, pgdata: &Path) -> Vec<Manager> {
        let postmaster = postmaster(pgdata).filter(|pid| self.all.contains_key(pid));
        let line = postmaster.map_or_else(Vec::new, |pid| self.ancestry(pid));
        let mut found: Vec<Manager> = KNOWN
            .iter()
            .filter_map(|known| self.manager(known, &line, pgdata))
            .collect();
        if postmaster == Some(1) {
            found.push(Manager {
                name: "container".to_owned(),
                evidence: "the postmaster is process 1: the container ends when it stops"
                    .to_owned(),
                next:
                    "restore into another directory or container, then start the container on that"
                        .to_owned(),
            });
        }
        found
    }

    fn manager(&self, known: &Known, line: &[u32], pgdata: &Path) -> Option<Manager> {
        let made = |evidence: String| Manager {
            name: known.name.to_owned(),
            evidence,
            next: known.next.to_owned(),
        };
        let ancestors = line.iter().skip(1);
        let ancestor = ancestors
            .copied()
            .find(|pid| self.all[pid].runs(known.programs).is_some());
        if let Some(pid) = ancestor {
            let program = self.all[&pid].runs(known.programs).unwrap_or_default();
            return Some(made(format!(
                "the postmaster was started by process {pid} (`{program}`)"
            )));
        }
        if ONLY_AS_ANCESTOR.contains(&known.name) {
            return None;
        }
        let mut pids: Vec<_> = self.all.keys().copied().collect();
        pids.sort_unstable();
        pids.into_iter().find_map(|pid| {
            let process = &self.all[&pid];
            let program = process.runs(known.programs)?;
            let why = match is_of(known, process, pgdata) {
                Mine::No => return None,
                Mine::Yes(why) | Mine::Unknown(why) => why,
            };
            Some(made(format!("process {pid} (`{program}`) runs, and {why}")))
        })
    }

    /// The systemd service that the postmaster is in.
    fn unit(&self, pgdata: &Path) -> Option<String> {
        let cgroup = self
            .root
            .join(postmaster(pgdata)?.to_string())
            .join("cgroup");
        unit_of(&fs::read_to_string(cgroup).ok()?)
    }
}

/// Whether a manager's process is one of the database in `pgdata`: by a file it keeps there, by its arguments, by
/// the configuration that they name.
fn is_of(known: &Known, process: &Process, pgdata: &Path) -> Mine {
    if let Some(file) = known.file
        && pgdata.join(file).exists()
    {
        return Mine::Yes(format!("the data directory has its `{file}`"));
    }
    let directory = pgdata.to_string_lossy();
    let mentions = |text: &str| {
        text.match_indices(&*directory).any(|(at, found)| {
            let after = text[at + found.len()..]
                .trim_start_matches('/')
                .chars()
                .next();
            after.is_none_or(|c| c.is_whitespace() || "'\",;#".contains(c))
        })
    };
    if process.argv.iter().any(|arg| mentions(arg)) {
        return Mine::Yes("its arguments name the data directory".to_owned());
    }
    let files = process.argv.iter().skip(1).filter_map(|arg| {
        let path = arg.split_once('=').map_or(arg.as_str(), |(_, value)| value);
        let named = [".yml", ".yaml", ".conf", ".cfg", ".ini", ".json"];
        named.iter().any(|end| path.ends_with(end)).then_some(path)
    });
    let mut read = false;
    for path in files {
        let Ok(file) = fs::File::open(path) else {
            return Mine::Unknown(format!("its configuration `{path}` cannot be read"));
        };
        let mut text = String::new();
        if file.take(CONFIG_LIMIT).read_to_string(&mut text).is_err() {
            return Mine::Unknown(format!("its configuration `{path}` cannot be read"));
        }
        if mentions(&text) {
            return Mine::Yes(format!(
                "its configuration `{path}` names the data directory"
            ));
        }
        read = true;
    }
    if read {
        Mine::No
    } else {
        Mine::Unknown("it cannot be seen whether of another database".to_owned())
    }
}

fn process(root: &Path, pid: u32) -> Option<Process> {
    let directory = root.join(pid.to_string());
    let status = fs::read_to_string(directory.join("status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    let argv = fs::read(directory.join("cmdline")).unwrap_or_default();
    let argv = argv.split(|byte| *byte == 0).filter(|arg| !arg.is_empty());
    Some(Process {
        parent: parent.trim().parse().ok()?,
        argv: argv
            .map(|arg| String::from_utf8_lossy(arg).into_owned())
            .collect(),
    })
}

/// The process that `postmaster.pid` names.
pub(crate) fn postmaster(pgdata: &Path) -> Option<u32> {
    let text = fs::read_to_string(pgdata.join("postmaster.pid")).ok()?;
    // A single-user server writes its number negative.
    text.lines().next()?.trim().parse().ok()
}

/// The innermost service of a line such as `0::/system.slice/system-postgresql.slice/postgresql@15-main.service`.
/// A log-in session is none, and neither is the service that a user's own programs run in.
fn unit_of(cgroup: &str) -> Option<String> {
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let units = paths.filter_map(|path| path.rsplit('/').find(|part| part.ends_with(".service")));
    let mut units = units.filter(|unit| !unit.starts_with("user@"));
    units.next().map(str::to_owned)
}

#[cfg(test)]
mod tests;
