# Homebrew formula: installs the wheel of a release into an environment of its own.
# `python packaging/formula.py WHEEL` fills in version and digest of a built wheel.
class MlxDora < Formula
  desc "DoRA (weight-decomposed low-rank adaptation) for Apple's MLX"
  url "https://files.pythonhosted.org/packages/py3/m/mlx-dora/mlx_dora-@VERSION@-py3-none-any.whl",
      using: :nounzip
  version "@VERSION@"
  sha256 "@SHA256@"
  license "MIT"

  depends_on arch: :arm64
  depends_on :macos
  depends_on "python@3.13"

  def install
    system "python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", Dir["*.whl"].first
    bin.install_symlink Dir[libexec/"bin/mlx_dora*"]
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx_dora --version")
  end
end
