//! `pitr-agent`: runs beside one data node, copies it into the bucket and brings it back.

fn main() {}
