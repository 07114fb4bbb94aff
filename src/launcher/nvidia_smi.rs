//! The GPUs that `nvidia-smi` lists: their numbers, which the order of the bus gives, and their places on it.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// How long it may take: it wakes a driver that sleeps.
const TIMEOUT: Duration = Duration::from_secs(15);

/// One GPU: its number, and its address as sysfs writes it (`0000:3b:00.0`).
pub(super) type Listed = (u32, String);

/// What it lists; none where it is not installed, or does not answer.
pub(super) async fn gpus() -> Option<Vec<Listed>> {
    let asked = Command::new("nvidia-smi")
        .args(["--query-gpu=index,pci.bus_id", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(TIMEOUT, asked).await.ok()?.ok()?;
    output.status.success().then(|| parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines `0, 00000000:3B:00.0`; sysfs has small letters, and a domain of four digits.
fn parse(text: &str) -> Vec<Listed> {
    let line = |line: &str| {
        let (id, address) = line.split_once(',')?;
        let (domain, rest) = address.trim().split_once(':')?;
        let domain = u32::from_str_radix(domain, 16).ok()?;
        Some((id.trim().parse().ok()?, format!("{domain:04x}:{}", rest.to_lowercase())))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_gpus_are_read() {
        let listed = parse("0, 00000000:3B:00.0\n1, 00010000:5E:00.0\nNo devices were found\n");
        assert_eq!(listed, [(0, "0000:3b:00.0".to_owned()), (1, "10000:5e:00.0".to_owned())]);
    }
}
