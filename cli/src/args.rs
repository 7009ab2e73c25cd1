//! The command line.

use clap::{Parser, Subcommand};

use crate::commands::backup::BackupArgs;
use crate::commands::certs::CertsCommand;
use crate::commands::check::CheckArgs;
use crate::commands::completions::CompletionsArgs;
use crate::commands::delete::DeleteArgs;
use crate::commands::man::ManArgs;
use crate::commands::metadata::MetadataArgs;
use crate::commands::operations::OperationsArgs;
use crate::commands::point::PointCommand;
use crate::commands::prune::PruneArgs;
use crate::commands::restore::RestoreArgs;
use crate::commands::show::ShowArgs;
use crate::commands::unlock::UnlockArgs;
use crate::commands::verify::VerifyArgs;
use crate::commands::wal::WalCommand;
use crate::exit;
use crate::settings::GlobalArgs;

/// One backup of a whole cluster, straight into a bucket, and back
#[derive(Debug, Parser)]
#[command(
    name = "gs_pitr",
    version,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_long_help = exit::help("
    gs_pitr certs init
    gs_pitr backup --repo s3://backups/prod --nodes db1:18080,db2:18080
    gs_pitr show --repo s3://backups/prod
    gs_pitr restore --repo s3://backups/prod --id 20261121T040233Z-F-9f3c1a2b \\
    --nodes db1:18080,db2:18080 --target-dir /srv/restored"))]
pub(crate) struct Cli {
    /// What every command knows.
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Back up all nodes to one point
    #[command(after_long_help = exit::help("
        gs_pitr backup --nodes db1:18080,db2:18080
        gs_pitr backup --nodes db1:18080,db2:18080 -j 8 --label 'before the upgrade' --bandwidth 50MiB
        GS_PITR_PROXY_PASSWORD=... gs_pitr backup --host proxy1 --username root
        gs_pitr backup --profile prod --output json"))]
    Backup(BackupArgs),
    /// Make points to recover to without copying anything, or list them
    #[command(subcommand, after_long_help = exit::help("
        gs_pitr point create --nodes db1:18080,db2:18080 --every 5m
        gs_pitr point list"))]
    Point(PointCommand),
    /// List the backups, or one in detail
    #[command(after_long_help = exit::help("
        gs_pitr show
        gs_pitr show 20261121T04
        gs_pitr show --output json
        gs_pitr show --from-mirror"))]
    Show(ShowArgs),
    /// Bring all nodes of a backup back, where they live or in fresh directories, recovered to a point
    #[command(after_long_help = exit::help("
        gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080
        gs_pitr restore --id 20261121T04 --host proxy1 --username root
        gs_pitr restore --time '2026-11-21 04:02:00' --nodes db1:18080,db2:18080
        gs_pitr restore --id 20261121T04 --nodes db1:18080,db2:18080 --target-dir /srv/restored --yes
        gs_pitr restore --id 20261121T04 --nodes new1:18080,new2:18080 --target-dir /srv/restored \\
        --map db1:5432=new1:18080 --map db2:5432=new2:18080 --no-start"))]
    Restore(RestoreArgs),
    /// Delete one backup
    #[command(after_long_help = exit::help("
        gs_pitr delete --id 20261121T04 --dry-run
        gs_pitr delete --id 20261121T04 --yes"))]
    Delete(DeleteArgs),
    /// Remove old backups by a retention, and what dead ones left
    #[command(after_long_help = exit::help("
        gs_pitr prune --keep-full 7 --dry-run
        gs_pitr prune --keep-full 7 --keep-days 30 --yes"))]
    Prune(PruneArgs),
    /// Read stored bytes back and find every damage
    #[command(after_long_help = exit::help("
        gs_pitr verify --id 20261121T04
        gs_pitr verify --all --bandwidth 100MiB"))]
    Verify(VerifyArgs),
    /// Find out whether backups and restores will work, and what to mend
    #[command(after_long_help = exit::help("
        gs_pitr check --nodes db1:18080,db2:18080
        gs_pitr check --host proxy1 --username root --password-file /etc/gs_pitr/proxy"))]
    Check(CheckArgs),
    /// Clear a lock that is left on a ShardingSphere cluster, after showing what is known of it
    #[command(after_long_help = exit::help("
        gs_pitr unlock --host proxy1 --username root
        gs_pitr unlock --host proxy1 --username root --password-file /etc/gs_pitr/proxy --yes"))]
    Unlock(UnlockArgs),
    /// Compare the databases and rules that the proxies know with those of a point, and bring those back
    #[command(after_long_help = exit::help("
        gs_pitr metadata 20261121T04 --host proxy1 --username root
        gs_pitr metadata 20261121T04 --host proxy1 --username root --import"))]
    Metadata(MetadataArgs),
    /// List what ran, show one operation, or finish one that was left
    #[command(after_long_help = exit::help("
        gs_pitr operations
        gs_pitr operations 019f2b6c
        gs_pitr operations resume 019f2b6c --yes"))]
    Operations(OperationsArgs),
    /// Show, start or stop the WAL that the agents ship all the time
    #[command(subcommand, after_long_help = exit::help("
        gs_pitr wal status --nodes db1:18080,db2:18080
        gs_pitr wal start --nodes db1:18080,db2:18080
        gs_pitr wal stop --nodes db1:18080"))]
    Wal(WalCommand),
    /// Make certificates for the agents and for this program
    #[command(subcommand, after_long_help = exit::help("
        gs_pitr certs init
        gs_pitr certs issue --name db1 --san db1.example --san 10.0.0.11"))]
    Certs(CertsCommand),
    /// Print a script that completes this program's command line
    #[command(after_long_help = exit::help("
        gs_pitr completions bash > /etc/bash_completion.d/gs_pitr"))]
    Completions(CompletionsArgs),
    /// Print the manual page, or write all of them
    #[command(after_long_help = exit::help("
        gs_pitr man | man -l -
        gs_pitr man --dir /usr/local/share/man/man1"))]
    Man(ManArgs),
}

impl Command {
    /// Its name as it stands in results.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Backup(_) => "backup",
            Self::Point(command) => command.name(),
            Self::Show(_) => "show",
            Self::Restore(_) => "restore",
            Self::Delete(_) => "delete",
            Self::Prune(_) => "prune",
            Self::Verify(_) => "verify",
            Self::Check(_) => "check",
            Self::Unlock(_) => "unlock",
            Self::Metadata(_) => "metadata",
            Self::Operations(args) => args.name(),
            Self::Wal(command) => command.name(),
            Self::Certs(CertsCommand::Init(_)) => "certs init",
            Self::Certs(CertsCommand::Issue(_)) => "certs issue",
            Self::Completions(_) => "completions",
            Self::Man(_) => "man",
        }
    }
}
