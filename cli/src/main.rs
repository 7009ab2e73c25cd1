//! `gs_pitr`: one cluster-consistent backup of a sharded database, straight into a bucket, and back.

fn main() {}
