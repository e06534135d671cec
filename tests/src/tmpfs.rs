//! A small file system in memory, for full and read-only disks.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system mounted for one test; dropping it unmounts it. Needs root, as the test machine has.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one at a folder that is made, with options such as `size=8m`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn mount(at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).expect("the mount point can be made");
        mount(&["-t", "tmpfs", "-o", options, "tmpfs"], at);
        Self(at.to_owned())
    }

    /// Changes its options, to `ro` for example.
    ///
    /// # Panics
    /// When that is refused.
    pub fn remount(&self, options: &str) {
        mount(&["-o", &format!("remount,{options}")], &self.0);
    }

    /// Returns where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mount(args: &[&str], at: &Path) {
    let output = Command::new("mount").args(args).arg(at).output().expect("mount is installed");
    assert!(
        output.status.success(),
        "mount {args:?}: {} (tests that mount file systems run as root)",
        String::from_utf8_lossy(&output.stderr)
    );
}
