//! The key of every object, one pure function each. docs/FORMAT.md has them as a table.

use pipeline::store::{InvalidKey, Key};
use uuid::Uuid;

use crate::ids::{BackupId, EpochId, PointId};
use crate::model::LeaseScope;
use crate::wal::WalName;

/// Every top-level name that a repository uses below its prefix.
pub const ROOTS: [&str; 9] = [
    REPOSITORY, LOG, "lease/", NODES, BACKUPS, "wal/", POINTS, METADATA, OPERATIONS,
];
pub(crate) const REPOSITORY: &str = "repository.json";
pub(crate) const LOG: &str = "log/";
pub(crate) const NODES: &str = "nodes/";
pub(crate) const BACKUPS: &str = "backups/";
pub(crate) const POINTS: &str = "points/";
pub(crate) const METADATA: &str = "metadata/";
pub(crate) const OPERATIONS: &str = "operations/";

#[expect(
    clippy::expect_used,
    reason = "every part is a fixed word, a number or an id whose type has checked it"
)]
fn key(name: String) -> Key {
    Key::new(name).expect("a key made of checked parts")
}

/// `repository.json`
#[must_use]
pub fn repository() -> Key {
    key(REPOSITORY.to_owned())
}

/// `log/<seq>.json`, ten digits.
#[must_use]
pub fn log(seq: u64) -> Key {
    key(format!("{LOG}{seq:010}.json"))
}

/// `lease/<scope>/<seq>.json`, ten digits.
#[must_use]
pub fn lease(scope: LeaseScope, seq: u64) -> Key {
    key(format!("{}{seq:010}.json", leases_prefix(scope)))
}

/// `lease/<scope>/`, not a key: the prefix of all of a scope.
#[must_use]
pub fn leases_prefix(scope: LeaseScope) -> String {
    format!("lease/{}/", scope.name())
}

/// `nodes/<node-id>.json`
#[must_use]
pub fn node(node: Uuid) -> Key {
    key(format!("{NODES}{node}.json"))
}

/// `backups/<backup-id>/manifest.json`
#[must_use]
pub fn manifest(backup: &BackupId) -> Key {
    key(format!("{BACKUPS}{backup}/manifest.json"))
}

/// `backups/<backup-id>/deleted.json`
#[must_use]
pub fn tombstone(backup: &BackupId) -> Key {
    key(format!("{BACKUPS}{backup}/deleted.json"))
}

/// `backups/<backup-id>/<node-id>/<attempt>/index`
#[must_use]
pub fn index(backup: &BackupId, node: Uuid, attempt: u32) -> Key {
    key(format!("{BACKUPS}{backup}/{node}/{attempt}/index"))
}

/// `backups/<backup-id>/<node-id>/<attempt>/pack-<number>`, five digits.
#[must_use]
pub fn pack(backup: &BackupId, node: Uuid, attempt: u32, number: u32) -> Key {
    key(format!(
        "{BACKUPS}{backup}/{node}/{attempt}/pack-{number:05}"
    ))
}

/// `wal/<node-id>/`, not a key: the prefix of all epochs of a node.
#[must_use]
pub fn epochs_prefix(node: Uuid) -> String {
    format!("wal/{node}/")
}

/// `wal/<node-id>/<epoch>/`, not a key: the prefix of all that belongs to an epoch.
#[must_use]
pub fn epoch_prefix(node: Uuid, epoch: &EpochId) -> String {
    format!("wal/{node}/{epoch}/")
}

/// `wal/<node-id>/<epoch>/epoch.json`
#[must_use]
pub fn epoch(node: Uuid, epoch: &EpochId) -> Key {
    key(format!("wal/{node}/{epoch}/epoch.json"))
}

/// `wal/<node-id>/<epoch>/gap-`, not a key: what the keys of an epoch's gaps begin with.
#[must_use]
pub fn gaps_prefix(node: Uuid, epoch: &EpochId) -> String {
    format!("wal/{node}/{epoch}/gap-")
}

/// `wal/<node-id>/<epoch>/gap-<from>-<to>.json`, two positions of 16 upper-case hex digits each: WAL that is missing for
/// good.
#[must_use]
pub fn gap(node: Uuid, epoch: &EpochId, from: u64, to: u64) -> Key {
    key(format!("wal/{node}/{epoch}/gap-{from:016X}-{to:016X}.json"))
}

/// `wal/<node-id>/<epoch>/<name>.zst`: a WAL segment or a timeline history.
#[must_use]
pub fn wal(node: Uuid, epoch: &EpochId, name: &WalName) -> Key {
    key(format!("wal/{node}/{epoch}/{name}.zst"))
}

/// `wal/<node-id>/<epoch>/<name>.<length>.zst`: the first `length` bytes of a segment (reserved).
#[must_use]
pub fn partial_wal(node: Uuid, epoch: &EpochId, name: &WalName, length: u64) -> Key {
    key(format!("wal/{node}/{epoch}/{name}.{length}.zst"))
}

/// `points/<point-id>.json`
#[must_use]
pub fn point(point: &PointId) -> Key {
    key(format!("{POINTS}{point}.json"))
}

/// `metadata/<point-id>.json`: beside the points and not below them, so that a listing of points has points only.
#[must_use]
pub fn metadata(point: &PointId) -> Key {
    key(format!("{METADATA}{point}.json"))
}

/// `operations/<operation-id>/`, not a key: the prefix of all that belongs to an operation.
#[must_use]
pub fn operation_prefix(operation: Uuid) -> String {
    format!("operations/{operation}/")
}

/// `operations/<operation-id>/<seq>.json`, six digits.
#[must_use]
pub fn operation_record(operation: Uuid, seq: u64) -> Key {
    key(format!("operations/{operation}/{seq:06}.json"))
}

/// `operations/<operation-id>/decision.json` : commit or rollback of a restore.
#[must_use]
pub fn decision(operation: Uuid) -> Key {
    key(format!("operations/{operation}/decision.json"))
}

/// `operations/<operation-id>/pin.json` : the backups that an operation still reads.
#[must_use]
pub fn pin(operation: Uuid) -> Key {
    key(format!("operations/{operation}/pin.json"))
}

/// `operations/<operation-id>/probe/`, not a key: the prefix of what a check of the store writes.
#[must_use]
pub fn probes_prefix(operation: Uuid) -> String {
    format!("operations/{operation}/probe/")
}

/// `operations/<operation-id>/probe/<name>`
///
/// # Errors
/// If `name` cannot stand in a key.
pub fn probe(operation: Uuid, name: &str) -> Result<Key, InvalidKey> {
    Key::new(format!("{}{name}", probes_prefix(operation)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_as_the_format_says() {
        let backup: BackupId = "20261121T040233Z-F-9f3c1a2b".parse().unwrap();
        let point_id: PointId = "20261121T040233Z-P-9f3c1a2b".parse().unwrap();
        let epoch_id: EpochId = "00000001-9f3c1a2b".parse().unwrap();
        let name: WalName = "000000010000000A000000FF".parse().unwrap();
        let id = Uuid::nil();
        let z = "00000000-0000-0000-0000-000000000000";
        let b = "backups/20261121T040233Z-F-9f3c1a2b";
        let w = format!("wal/{z}/00000001-9f3c1a2b");
        let table = [
            (repository(), "repository.json".to_owned()),
            (log(7), "log/0000000007.json".to_owned()),
            (
                lease(LeaseScope::Maintain, 1),
                "lease/maintain/0000000001.json".to_owned(),
            ),
            (node(id), format!("nodes/{z}.json")),
            (manifest(&backup), format!("{b}/manifest.json")),
            (tombstone(&backup), format!("{b}/deleted.json")),
            (index(&backup, id, 2), format!("{b}/{z}/2/index")),
            (pack(&backup, id, 2, 13), format!("{b}/{z}/2/pack-00013")),
            (epoch(id, &epoch_id), format!("{w}/epoch.json")),
            (
                wal(id, &epoch_id, &name),
                format!("{w}/000000010000000A000000FF.zst"),
            ),
            (
                gap(id, &epoch_id, 0xA_FF00_0000, 0xB_0000_0000),
                format!("{w}/gap-0000000AFF000000-0000000B00000000.json"),
            ),
            (
                partial_wal(id, &epoch_id, &name, 512),
                format!("{w}/000000010000000A000000FF.512.zst"),
            ),
            (
                point(&point_id),
                "points/20261121T040233Z-P-9f3c1a2b.json".to_owned(),
            ),
            (
                metadata(&point_id),
                "metadata/20261121T040233Z-P-9f3c1a2b.json".to_owned(),
            ),
            (
                operation_record(id, 1),
                format!("operations/{z}/000001.json"),
            ),
            (decision(id), format!("operations/{z}/decision.json")),
            (pin(id), format!("operations/{z}/pin.json")),
        ];
        for (made, wanted) in table {
            assert_eq!(made.as_str(), wanted);
            assert!(
                ROOTS.iter().any(|root| wanted.starts_with(root)),
                "{wanted}"
            );
        }
    }
}
