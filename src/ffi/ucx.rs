//! UCX, which NIXL's backend of that name runs on: which copies of it a process has loaded, and which modules lie beside them.
//!
//! Nothing of it is called. Its files tell: a transport that is no part of the core is a module in the folder `ucx` beside the
//! library (or in `UCX_MODULE_DIR`), loaded at start if what it needs is there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The library whose copies are counted: each brings all the others.
const CORE: &str = "libucp";
const MODULE: &str = "libuct_";

/// Transports that the core has without any module.
pub const BUILT_IN: [&str; 4] = ["self", "tcp", "sysv", "posix"];

/// Modules that matter here, and the transports that each brings.
const TRANSPORTS: [(&str, &[&str]); 9] = [
    ("cuda", &["cuda_copy", "cuda_ipc"]),
    ("cuda_gdrcopy", &["gdr_copy"]),
    ("ib", &["rc_verbs", "ud_verbs"]),
    ("ib_mlx5", &["rc_mlx5", "dc_mlx5", "ud_mlx5"]),
    ("ib_efa", &["srd"]),
    ("cma", &["cma"]),
    ("xpmem", &["xpmem"]),
    ("knem", &["knem"]),
    ("rdmacm", &["rdmacm"]),
];

/// UCX as one process has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Loaded {
    /// Each copy of the library. More than one is a fault: they share names and take each other's place.
    pub copies: Vec<PathBuf>,
    /// Modules that could be loaded, by name: `cuda`, `ib_mlx5`.
    pub modules: BTreeSet<String>,
    /// Modules that lie beside the first copy.
    pub built: BTreeSet<String>,
}

impl Loaded {
    /// Of this process.
    pub fn here() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let folder = std::env::var_os("UCX_MODULE_DIR").map(PathBuf::from);
        Self::of(&maps, folder.as_deref())
    }

    fn of(maps: &str, module_dir: Option<&Path>) -> Self {
        let files = mapped_files(maps);
        let named = |path: &&PathBuf| file_name(path).is_some_and(is_core);
        let copies: Vec<PathBuf> = files.iter().filter(named).cloned().collect();
        let modules = files.iter().filter_map(|path| module_of(file_name(path)?)).collect();
        let beside = copies.first().and_then(|copy| Some(copy.parent()?.join("ucx")));
        let built = module_dir.map(Path::to_owned).or(beside).map(|folder| modules_in(&folder)).unwrap_or_default();
        Self { copies, modules, built }
    }

    /// Transports that this build has, usable on this machine or not.
    pub fn transports(&self) -> Vec<&'static str> {
        let of_modules = TRANSPORTS.iter().filter(|(module, _)| self.built.contains(*module));
        BUILT_IN.into_iter().chain(of_modules.flat_map(|(_, transports)| transports.iter().copied())).collect()
    }

    /// Whether GPU memory is known as such.
    pub fn knows_gpus(&self) -> bool {
        self.built.contains("cuda")
    }

    pub fn knows_rdma(&self) -> bool {
        ["ib", "ib_mlx5", "ib_efa"].iter().any(|module| self.built.contains(*module))
    }
}

/// `libucp.so.0`, or `libucp-b39b3ed9.so.0.0.0` of a wheel.
fn is_core(name: &str) -> bool {
    name.strip_prefix(CORE).is_some_and(|rest| rest.starts_with('.') || rest.starts_with('-'))
}

/// `cuda` of `libuct_cuda.so.0.0.0`.
fn module_of(name: &str) -> Option<String> {
    let (module, _) = name.strip_prefix(MODULE)?.split_once(".so")?;
    Some(module.split('-').next().unwrap_or(module).to_owned())
}

fn modules_in(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| module_of(entry.file_name().to_str()?)).collect()
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The files of `/proc/PID/maps`, each once.
fn mapped_files(maps: &str) -> Vec<PathBuf> {
    let files: BTreeSet<PathBuf> =
        maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..]))).collect();
    files.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_and_modules_are_told_by_their_files() {
        let wheel = tempfile::tempdir().unwrap();
        let libs = wheel.path().join("nixl_cu13.libs");
        std::fs::create_dir_all(libs.join("ucx")).unwrap();
        for module in ["libuct_ib.so.0.0.0", "libuct_cma.so.0", "libuct_ib.la", "libucx_perftest_mad.so.0"] {
            std::fs::write(libs.join("ucx").join(module), "").unwrap();
        }
        let line = |file: &str| format!("7f00-7f01 r-xp 00000000 00:1f 77    {file}\n");
        let own = libs.join("libucp-b39b3ed9.so.0.0.0");
        let module = libs.join("ucx/libuct_cma.so.0.0.0");
        let mut maps =
            line(own.to_str().unwrap()).repeat(3) + &line(module.to_str().unwrap()) + &line("/usr/lib/libc.so.6");
        let alone = Loaded::of(&maps, None);
        assert_eq!(alone.copies, std::slice::from_ref(&own));
        assert_eq!(alone.modules.iter().collect::<Vec<_>>(), ["cma"]);
        assert_eq!(alone.transports(), ["self", "tcp", "sysv", "posix", "rc_verbs", "ud_verbs", "cma"]);
        assert!(!alone.knows_gpus() && alone.knows_rdma());
        maps += &line("/usr/lib/x86_64-linux-gnu/libucp.so.0.0.0");
        assert_eq!(Loaded::of(&maps, None).copies.len(), 2);
        assert!(Loaded::of(&maps, Some(Path::new("/nowhere"))).built.is_empty());
        assert_eq!(Loaded::of("", None), Loaded::default());
    }
}
