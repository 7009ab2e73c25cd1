//! `gs_pitr certs`: a CA of one's own, and the leaves it signs.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::certs::{self, Authority, Facts, Role, San};
use crate::exit;
use crate::failure::{Failure, Result};
use crate::printer::Printer;
use crate::settings::Settings;

/// `gs_pitr certs ...`
#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make a CA and the operator's certificate
    #[command(after_long_help = exit::help("
        gs_pitr certs init
        gs_pitr certs init --dir /etc/gs_pitr/certs --name 'backup of prod'"))]
    Init(InitArgs),
    /// Issue an agent's certificate, or renew the operator's
    #[command(after_long_help = exit::help("
        gs_pitr certs issue --name db1 --san db1.example --san 10.0.0.11
        gs_pitr certs issue --name db1 --san db1.example --out /tmp/db1 --days 90
        gs_pitr certs issue --operator"))]
    Issue(IssueArgs),
}

/// `gs_pitr certs init`
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Where the files go; without it, `~/.gs_pitr/certs`
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Common name of the CA
    #[arg(long, value_name = "CN", default_value = "gs_pitr CA")]
    name: String,
    /// Days that the operator's certificate is valid (the CA: ten years)
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
}

/// `gs_pitr certs issue`
#[derive(Debug, Args)]
pub(crate) struct IssueArgs {
    /// Name of the certificate and its files: NAME.crt and NAME.key
    #[arg(
        long,
        required_unless_present = "operator",
        conflicts_with = "operator"
    )]
    name: Option<String>,
    /// DNS name or IP address that clients reach the agent under; repeat for more
    #[arg(
        long,
        value_name = "DNS-OR-IP",
        value_delimiter = ',',
        required_unless_present = "operator",
        conflicts_with = "operator"
    )]
    san: Vec<San>,
    /// Renew the operator's certificate (its key stays)
    #[arg(long)]
    operator: bool,
    /// Where the CA is; without it, `~/.gs_pitr/certs`
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where the agent's files go [default: as --dir]
    #[arg(long, value_name = "DIR", conflicts_with = "operator")]
    out: Option<PathBuf>,
    /// Days that it is valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
}

const CA_DAYS: u32 = 3650;

/// Runs the command.
pub(crate) fn run(command: &CertsCommand, settings: &Settings, printer: &Printer) -> Result<()> {
    match command {
        CertsCommand::Init(args) => init(args, settings, printer),
        CertsCommand::Issue(args) if args.operator => renew(args, settings, printer),
        CertsCommand::Issue(args) => issue(args, settings, printer),
    }
}

fn directory(given: Option<&PathBuf>, settings: &Settings) -> PathBuf {
    given.cloned().unwrap_or_else(|| settings.certs_dir())
}

fn init(args: &InitArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let dir = directory(args.dir.as_ref(), settings);
    let names = ["ca.key", "ca.crt", "operator.key", "operator.crt"];
    let [ca_key, ca_crt, key, crt] = names.map(|name| dir.join(name));
    refuse_existing([&ca_key, &ca_crt, &key, &crt])
        .map_err(|failure| failure.next("gs_pitr certs issue --operator (renews what is there)"))?;
    make_dir(&dir)?;
    let authority = certs::make_authority(&args.name, CA_DAYS)?;
    // Keys first: a certificate whose key was never written would look whole.
    create(&ca_key, &authority.key, 0o600)?;
    create(&ca_crt, &authority.cert, 0o644)?;
    let authority = Authority::load(&ca_crt, &ca_key)?;
    let operator = authority.issue("gs_pitr operator", &Role::Operator, args.days, None)?;
    create(&key, &operator.key, 0o600)?;
    create(&crt, &operator.cert, 0o644)?;
    sync_dir(&dir)?;
    let operator = Facts::read(&crt, &operator.cert)?;
    let text = format!(
        "CA                    {} (expires {}; keep {} safe: whoever has it can be an operator)\n\
         operator certificate  {} (expires {})\n\
         next: gs_pitr certs issue --name NODE --san HOST, once for each agent",
        ca_crt.display(),
        authority.not_after(),
        ca_key.display(),
        crt.display(),
        operator.not_after,
    );
    printer.text(&text);
    let files = [&ca_crt, &ca_key, &crt, &key].map(|path| path.display().to_string());
    let fields =
        json!({"files": files, "ca_expires": authority.not_after(), "expires": operator.not_after});
    printer.result("certs init", fields);
    Ok(())
}

fn issue(args: &IssueArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let name = args.name.as_deref().unwrap_or_default();
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(fine) {
        let message =
            format!("`--name {name}`: only letters, digits, `-`, `_` and `.`, as it names files");
        return Err(Failure::usage(message));
    }
    if ["ca", "operator"].contains(&name) {
        return Err(Failure::usage(format!("`--name {name}` is taken")));
    }
    let dir = directory(args.dir.as_ref(), settings);
    let out = args.out.clone().unwrap_or_else(|| dir.clone());
    let authority = Authority::load(&dir.join("ca.crt"), &dir.join("ca.key"))?;
    let (crt, key) = (
        out.join(format!("{name}.crt")),
        out.join(format!("{name}.key")),
    );
    refuse_existing([&crt, &key])
        .map_err(|failure| failure.next("move them away, or choose another `--name` or `--out`"))?;
    make_dir(&out)?;
    let leaf = authority.issue(name, &Role::Agent(args.san.clone()), args.days, None)?;
    create(&key, &leaf.key, 0o600)?;
    create(&crt, &leaf.cert, 0o644)?;
    sync_dir(&out)?;
    let facts = Facts::read(&crt, &leaf.cert)?;
    let (crt, key, ca) = (crt.display(), key.display(), dir.join("ca.crt"));
    let text = format!(
        "agent certificate  {crt} (expires {})\nits key            {key}\n\
         next: bring both and {ca} to its host, then\n\
         pitr-agent --tls-crt {name}.crt --tls-key {name}.key --tls-ca ca.crt --pgdata ...",
        facts.not_after,
        ca = ca.display(),
    );
    printer.text(&text);
    let files = [crt.to_string(), key.to_string()];
    printer.result(
        "certs issue",
        json!({"files": files, "expires": facts.not_after}),
    );
    Ok(())
}

fn renew(args: &IssueArgs, settings: &Settings, printer: &Printer) -> Result<()> {
    let dir = directory(args.dir.as_ref(), settings);
    let authority = Authority::load(&dir.join("ca.crt"), &dir.join("ca.key"))?;
    let (crt, key) = (dir.join("operator.crt"), dir.join("operator.key"));
    // The key stays if there is one, so that one rename changes all and a crash leaves a pair.
    let old = match std::fs::read_to_string(&key) {
        Ok(pem) => Some(pem),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Failure::file(&key, "read", &error)),
    };
    let leaf = authority.issue(
        "gs_pitr operator",
        &Role::Operator,
        args.days,
        old.as_deref(),
    )?;
    if old.is_none() {
        create(&key, &leaf.key, 0o600)?;
    }
    let new = dir.join(format!("operator.crt.{:08x}", rand::random::<u32>()));
    create(&new, &leaf.cert, 0o644)?;
    std::fs::rename(&new, &crt).map_err(|error| Failure::file(&crt, "replace", &error))?;
    sync_dir(&dir)?;
    let facts = Facts::read(&crt, &leaf.cert)?;
    let crt = crt.display();
    printer.text(&format!(
        "operator certificate  {crt} (expires {})",
        facts.not_after
    ));
    let fields = json!({"files": [crt.to_string()], "expires": facts.not_after});
    printer.result("certs issue", fields);
    Ok(())
}

fn refuse_existing<const N: usize>(paths: [&Path; N]) -> Result<()> {
    match paths
        .into_iter()
        .find(|path| path.symlink_metadata().is_ok())
    {
        None => Ok(()),
        Some(path) => {
            let message = format!("`{}` exists and is never overwritten", path.display());
            Err(Failure::new(agent_api::ErrorKind::Conflict, message))
        }
    }
}

/// Makes `dir` for its owner alone. One that is there keeps its mode; others may hold certificates
/// that other users read, and the keys are protected by their own modes.
fn make_dir(dir: &Path) -> Result<()> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Failure::file(dir, "make the directory", &error))
}

fn create(path: &Path, text: &str, mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut open = OpenOptions::new();
        let mut file = open.write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(|error| {
        let failure = Failure::file(path, "write", &error);
        match error.kind() {
            io::ErrorKind::AlreadyExists => failure,
            _ => failure.changed_if(true),
        }
    })
}

fn sync_dir(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| Failure::file(dir, "sync", &error).changed_if(true))
}
