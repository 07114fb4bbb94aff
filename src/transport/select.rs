//! Which path carries a pair: the ones this process may offer, and the best one that both sides do.

use std::sync::Arc;
use std::time::Instant;

use super::{Link, Offer, Transport, TransportError};
use crate::config::Path;

/// A connected path, and the better ones that could not be.
pub struct Selected {
    pub path: Path,
    /// Index of the chosen transport in the list that was given.
    pub transport: usize,
    pub link: Arc<dyn Link>,
    /// Paths that both sides offer and this side prefers, with why each could not be used. Never passed over in silence:
    /// it belongs in the log and the ready line.
    pub passed_over: Vec<(Path, TransportError)>,
}

/// What to tell a peer about `transports`.
pub fn export_all(transports: &[Arc<dyn Transport>]) -> Vec<Offer> {
    transports.iter().map(|transport| Offer { path: transport.path(), export: transport.export() }).collect()
}

/// Connects over the first of `ours` (best first, as configured) that the peer offers too and that can reach it. Blocks
/// until `deadline` at the latest.
pub fn connect_best(
    ours: &[Arc<dyn Transport>],
    theirs: &[Offer],
    deadline: Instant,
) -> Result<Selected, TransportError> {
    let mut passed_over = Vec::new();
    for (index, transport) in ours.iter().enumerate() {
        let path = transport.path();
        let Some(offer) = theirs.iter().find(|offer| offer.path == path) else { continue };
        match transport.connect(&offer.export, deadline) {
            Ok(link) => return Ok(Selected { path, transport: index, link, passed_over }),
            Err(error) => passed_over.push((path, error)),
        }
    }
    let tried: String = passed_over.iter().map(|(path, error)| format!("; {} failed: {error}", path.name())).collect();
    Err(TransportError::NoCommonPath {
        local: names(ours.iter().map(|transport| transport.path())),
        remote: names(theirs.iter().map(|offer| offer.path)),
        tried,
    })
}

fn names(paths: impl Iterator<Item = Path>) -> String {
    let names: Vec<&str> = paths.map(Path::name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::LoopbackHub;
    use super::*;

    #[test]
    fn our_order_decides_among_what_both_offer_and_can_reach() {
        let (near, far) = (LoopbackHub::new(), LoopbackHub::new());
        let ours: Vec<Arc<dyn Transport>> = vec![near.transport(Path::Shm, &[]), near.transport(Path::Tcp, &[])];
        let deadline = Instant::now() + Duration::from_secs(5);
        let tcp = near.transport(Path::Tcp, &[]);
        let offer = |transport: &dyn Transport| Offer { path: transport.path(), export: transport.export() };

        let both = [offer(&*tcp), offer(&*near.transport(Path::Shm, &[]))];
        let unreachable = [offer(&*tcp), offer(&*far.transport(Path::Shm, &[]))];
        let foreign = [offer(&*near.transport(Path::Nccl, &[]))];

        // The end behind the first offer has been dropped, which is what a peer that ended looks like.
        let chosen = connect_best(&ours, &both, deadline).unwrap();
        assert_eq!((chosen.path, chosen.transport, chosen.passed_over.len()), (Path::Tcp, 1, 1));
        let chosen = connect_best(&ours, &unreachable, deadline).unwrap();
        assert_eq!((chosen.path, chosen.passed_over[0].0), (Path::Tcp, Path::Shm));
        let shm = near.transport(Path::Shm, &[]);
        let chosen = connect_best(&ours, &[offer(&*tcp), offer(&*shm)], deadline).unwrap();
        assert_eq!((chosen.path, chosen.passed_over.len()), (Path::Shm, 0));
        let refused = connect_best(&ours, &foreign, deadline).err().unwrap().to_string();
        assert!(refused.contains("this side offers shm, tcp, the peer nccl"), "{refused}");
    }
}
