//! Which path carries a pair: the ones this process may offer, and the best one that both sides do.

#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{
    CudaIpc, Link, Nccl, NcclSetup, Nixl, NixlSetup, Offer, Shm, Tcp, TcpSetup, Transport, TransportError,
    nixl_surroundings,
};
use crate::config::{KvConfig, KvMemory, Path};
use crate::memory::{MemoryKind, Region};
use crate::security::Secret;

/// What is tried where `kv.paths` says nothing: all but NIXL, which needs a library that nobody may have installed.
const UNASKED: [Path; 4] = [Path::CudaIpc, Path::Nccl, Path::Shm, Path::Tcp];

/// What decides which paths a process offers.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    pub config: &'a KvConfig,
    /// The memory that peers may reach. Its order is the numbering that run lists use.
    pub regions: &'a [Arc<Region>],
    pub secret: &'a Secret,
    /// Where data ports listen, and the host name or address under which peers reach them.
    pub bind: IpAddr,
    pub advertise_host: &'a str,
}

/// Opens the paths that are allowed and can move this memory, best first.
pub fn offers(setup: &Setup) -> Result<Vec<Arc<dyn Transport>>, TransportError> {
    // No region means nothing to move yet: plain host memory then.
    let kind = setup.regions.first().map_or(MemoryKind::Host, |region| region.kind());
    let allowed = setup.config.paths.as_deref().unwrap_or(&UNASKED);
    let usable: Vec<Path> = allowed.iter().copied().filter(|path| moves(*path, kind)).collect();
    if usable.is_empty() {
        return Err(TransportError::NoUsablePath {
            memory: kind.name(),
            allowed: Path::list(allowed.iter().copied()),
            possible: Path::list(Path::BEST_FIRST.into_iter().filter(|path| moves(*path, kind))),
        });
    }
    if setup.config.paths.is_some() && usable.len() < allowed.len() {
        let unused = Path::list(allowed.iter().copied().filter(|path| !moves(*path, kind)));
        tracing::info!(%unused, memory = kind.name(), "allowed paths that do not move this memory are not offered");
    }
    let mut offered: Vec<Arc<dyn Transport>> = Vec::new();
    let mut failed = None;
    for path in usable {
        match open(path, setup) {
            Ok(transport) => offered.push(transport),
            Err(error) => {
                tracing::warn!(path = path.name(), %error, "an allowed path cannot be offered here");
                failed.get_or_insert(error);
            }
        }
    }
    // With one path left KV still moves, and the log says which do not. With none there is nothing to start for.
    if offered.is_empty() { Err(failed.expect("one path at least was tried")) } else { Ok(offered) }
}

/// Whether the path moves memory of this kind; the table is [`Path::moves`].
fn moves(path: Path, kind: MemoryKind) -> bool {
    path.moves(match kind {
        MemoryKind::Host => KvMemory::Host,
        MemoryKind::Cuda(_) => KvMemory::Gpu,
    })
}

fn open(path: Path, setup: &Setup) -> Result<Arc<dyn Transport>, TransportError> {
    match path {
        Path::Shm => Ok(Arc::new(Shm::new(setup.regions, copy_threads(setup.config))?)),
        Path::Tcp => {
            let tcp = TcpSetup {
                bind: setup.bind,
                advertise_host: setup.advertise_host.to_owned(),
                streams: setup.config.tcp_streams,
                stall_max: Duration::from_millis(setup.config.transfer_timeout_ms),
            };
            Ok(Arc::new(Tcp::new(setup.regions, setup.secret, &tcp)?))
        }
        Path::CudaIpc => Ok(Arc::new(CudaIpc::new(setup.regions)?)),
        Path::Nccl => {
            let nccl = NcclSetup {
                stall_max: Duration::from_millis(setup.config.transfer_timeout_ms),
                ..NcclSetup::of(&setup.config.nccl, setup.bind, setup.advertise_host)
            };
            Ok(Arc::new(Nccl::new(setup.regions, setup.secret, &nccl)?))
        }
        Path::Nixl => {
            nixl_surroundings::tell_of_environment(&setup.config.nixl);
            let nixl = Nixl::new(setup.regions, &NixlSetup::of(&setup.config.nixl, copy_threads(setup.config)))?;
            nixl_surroundings::tell_of_copies();
            Ok(Arc::new(nixl))
        }
    }
}

/// `kv.copy_threads`, or half the cores, 1 to 8.
pub fn copy_threads(config: &KvConfig) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    config.copy_threads.unwrap_or_else(|| (cores() / 2).clamp(1, 8))
}

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
        local: Path::list(ours.iter().map(|transport| transport.path())),
        remote: Path::list(theirs.iter().map(|offer| offer.path)),
        tried,
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

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

    #[test]
    fn only_allowed_paths_that_move_the_memory_are_offered_in_the_order_given() {
        let regions = [Region::shared(4096).unwrap()];
        let secret = Secret::generate().unwrap();
        let offered = |paths: Option<&[Path]>| {
            let config = KvConfig { paths: paths.map(<[Path]>::to_vec), ..KvConfig::default() };
            let (bind, advertise_host) = (Ipv4Addr::LOCALHOST.into(), "127.0.0.1");
            let setup = Setup { config: &config, regions: &regions, secret: &secret, bind, advertise_host };
            offers(&setup).map(|offers| offers.iter().map(|offer| offer.path()).collect::<Vec<_>>())
        };
        assert_eq!(offered(None).unwrap(), [Path::Shm, Path::Tcp]);
        assert_eq!(offered(Some(&[Path::Tcp])).unwrap(), [Path::Tcp]);
        assert_eq!(offered(Some(&[Path::Nccl, Path::Tcp, Path::Shm])).unwrap(), [Path::Tcp, Path::Shm]);
        assert_eq!(
            offered(Some(&[Path::CudaIpc])).unwrap_err().to_string(),
            "no path moves host memory here: allowed are cuda-ipc; allow one of nixl, shm, tcp in kv.paths"
        );
    }
}
